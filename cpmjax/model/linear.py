"""The only place a weight meets an activation.

I input, O output; R rows, all places of a batch together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from cpmjax.parallel.sharding import splits

FEW = 4  # rows up to which reading narrow weights once for each is about as fast as reading wide ones once
# XLA's CPU compiler makes a loop of a matrix-vector product only for a vector smaller than 16 KiB.
_LONGEST = 16 * 1024 // 4 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Narrow:
    """A leaf of 16-bit floats that is multiplied in a wider type: for one to four rows at a time on a CPU.

    Such a product takes as long as reading the weights does. XLA reads a matrix in its stored type, widening each
    number as it comes, under three conditions: its rows are outputs, it is multiplied by one vector of less than
    16 KiB, and it is an array of its own, not a slice. Any other product first writes a wide copy of the matrix. So the
    leaf [I, O...] is held as its transpose, in `parts_OI` whose inputs follow one another; and as its bits, since
    floats are widened, all of them, even where only some rows are looked up.
    """

    parts_OI: tuple[jax.Array, ...]  # uint16
    output: tuple[int, ...] = field(metadata={"static": True})  # O...
    dtype: jnp.dtype = field(metadata={"static": True})  # of the floats

    @classmethod
    def of(cls, leaf: jax.Array) -> Narrow:
        """A leaf [I, O...] in its own type."""
        leaf_OI = jax.lax.bitcast_convert_type(leaf.reshape(len(leaf), -1).T, jnp.uint16)
        parts = -(-len(leaf) // _LONGEST)
        return cls(tuple(jnp.array_split(leaf_OI, parts, axis=1)), leaf.shape[1:], leaf.dtype)

    def _floats(self, bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, self.dtype).astype(dtype)

    def wide(self, dtype: jnp.dtype) -> jax.Array:
        """The leaf [I, O...] in another type."""
        return self._floats(jnp.concatenate(self.parts_OI, axis=1), dtype).T.reshape(-1, *self.output)

    def of_outputs(self, outputs: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What single outputs, int32 of any shape, weigh their inputs with -> [..., I]."""
        return self._floats(jnp.concatenate([part_OI[outputs] for part_OI in self.parts_OI], axis=-1), dtype)

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [..., I] -> [..., O...] in the type of x: as with a wide leaf, but for the order of sums."""
        x_RI, parts_OI = x.reshape(-1, x.shape[-1]), self.parts_OI
        few = len(x_RI) <= FEW
        if few:
            # Without it all weights are widened once before the loop that decodes, and then read in the wide type.
            x_RI, parts_OI = jax.lax.optimization_barrier((x_RI, parts_OI))
            # By one, since XLA would compute anything cheaper than a division, with all that made x, for every output.
            x_RI = x_RI / (1 + 0 * x_RI)
        # Of unknown value to XLA. In a program of many rows nothing else kept the weights of all layers from being wide
        # at one time; and a product that is added to another, with nothing in between, is no loop of its own.
        zero = 0 * x_RI[0, 0]
        first, products_RO = 0, []
        for part_OI in parts_OI:
            pieces_RI, part_IO = x_RI[:, first : first + part_OI.shape[1]], self._floats(part_OI, x.dtype).T
            if few:
                products_RO.append(jnp.stack([piece_I @ part_IO for piece_I in pieces_RI]) * (1 + zero))
            else:
                products_RO.append(pieces_RI @ (part_IO + zero))
            first += part_OI.shape[1]
        return sum(products_RO[1:], products_RO[0]).reshape(*x.shape[:-1], *self.output)


def linear(leaf: jax.Array | Narrow, x: jax.Array) -> jax.Array:
    """x [..., I] times a leaf [I, O...], in the type of x -> [..., O...]."""
    if isinstance(leaf, Narrow):
        return leaf.multiply(x)
    # As one matrix: the gradient of the leaf sums over rows, and if those were two axes, batch and length, XLA's CPU
    # compiler would transpose what it is multiplied by first. A length that is split cannot be one axis with another.
    rows = x if splits("length") else x.reshape(-1, x.shape[-1])
    return jnp.tensordot(rows, leaf.astype(x.dtype), axes=1).reshape(*x.shape[:-1], *leaf.shape[1:])
