"""The state of an optimizer at rest in a quarter of the memory: moments in 8 bits, in blocks with a scale of their own.

After Dettmers et al. 2110.02861: a block is divided by its largest magnitude, and what is left, from 0 to 1, becomes
the nearest of few numbers that are not evenly spaced. A block is a row here, all entries along the last axis (2,304 or
5,760 in MiniCPM; theirs have 2,048): what a row is depends on no mesh, and where it is split, one small maximum is all
that its parts tell each other. Norm gains are no exception.

The numbers are those of a floating point with 3 bits of mantissa, 6 to 12 per cent apart, as Adam divides one moment
by the root of another: an error matters in proportion to its entry, not to its row. First moments and momenta have a
sign, and seven bits that reach down to 1.25 * 2 ** -16 of the row's largest. Second moments have none, and eight bits
reach 1.25 * 2 ** -32, which is as far in units of the gradient. Rounding is stochastic, as in
`cpmjax.training.rounding` and for the same reason, with one exception: a second moment above 0 stays above 0, whatever
chance says, as its entry would else be divided by epsilon alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cpmjax.training.rounding import map_moments

_DROPPED = 20  # of the 23 bits of a float32's mantissa
_ONE = 127 << 3  # 1.0 without them


class EightBits(NamedTuple):
    codes: Any  # the state of a rule, its moments as int8 (first) or uint8 (second), in the shapes that they had
    scales: Any  # float32 [..., 1]: the largest magnitude of each row of each moment, and nothing elsewhere


def at_rest_in_eight_bits(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with its moments in 8 bits. Second moments are those that optax calls `nu`."""

    def narrow(wide: Any) -> EightBits:
        both = map_moments(lambda x, path, key: encode(x, key, signed=not _second(path)), wide)

        def part(choose: Callable[[Any], Any]) -> Any:
            return jax.tree.map(choose, both, is_leaf=_encoded)

        codes = part(lambda x: x.codes if _encoded(x) else x)
        return EightBits(codes, part(lambda x: x.scales if _encoded(x) else optax.MaskedNode()))

    def update(grads: Any, state: EightBits, params: Any = None) -> tuple[Any, EightBits]:
        scales = iter(jax.tree.leaves(state.scales))
        wide = map_moments(lambda x, *_: decode(Encoded(x, next(scales))), state.codes)
        updates, new = rule.update(grads, wide, params)
        return updates, narrow(new)

    return optax.GradientTransformation(lambda params: narrow(rule.init(params)), update)


class Encoded(NamedTuple):
    codes: jax.Array  # int8 or uint8 [..., W]
    scales: jax.Array  # float32 [..., 1]


def encode(x: jax.Array, key: jax.Array, signed: bool) -> Encoded:
    """float32 [..., W] -> 8 bits: one of the two neighbours, by chance, with x as the expected value; 0 or more where
    `signed` is false, and then never 0 of what is more."""
    most = 127 if signed else 255
    scales = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    share = jnp.abs(x) / jnp.where(scales > 0, scales, 1)
    noise = jax.random.bits(key, x.shape) >> (32 - _DROPPED)
    bits = jax.lax.bitcast_convert_type(share, jnp.uint32) + noise
    large = (bits >> _DROPPED).astype(jnp.int32) - (_ONE - most)
    smallest = _number(jnp.int32(1), most)
    small = (noise * (smallest / 2**_DROPPED) < share) if signed else x > 0
    codes = jnp.where(share < smallest, small.astype(jnp.int32), large)
    if signed:
        return Encoded(jnp.where(x < 0, -codes, codes).astype(jnp.int8), scales)
    return Encoded(codes.astype(jnp.uint8), scales)


def decode(x: Encoded) -> jax.Array:
    """float32 [..., W]"""
    codes = x.codes.astype(jnp.int32)
    return jnp.sign(codes) * _number(jnp.abs(codes), 127 if x.codes.dtype == jnp.int8 else 255) * x.scales


def _number(code: jax.Array, most: int) -> jax.Array:
    """What a code from 1 to `most` stands for: up to 1."""
    return jax.lax.bitcast_convert_type((code + (_ONE - most)) << _DROPPED, jnp.float32)


def _encoded(x: Any) -> bool:
    return isinstance(x, Encoded)


def _second(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "name", None) == "nu" for key in path)
