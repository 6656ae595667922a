"""Training leaves -> decode leaves: one dict a layer, projections of the same input fused, cast.

Separate arrays, because a slice of a stacked one is copied before it is multiplied; fused, because at one row a token a
matrix product is nothing but reading its weights, and one long read is faster than several short ones.

D width, H heads, G key-value heads, R heads per key-value head, K head width, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.model import mup
from cpmjax.model.linear import Narrow
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import Axes, constrain, padded, padded_shape

Layer = dict[str, Any]  # arrays, and Narrow matrices


class DecodeWeights(NamedTuple):
    """A pytree; the norms have the type of the arithmetic."""

    embedding: jax.Array | Narrow  # [V, D], V padded to what a mesh divides; a Narrow of its transpose
    layers: tuple[Layer, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array | Narrow | None  # [D, V] likewise; None where the embedding is the head
    multipliers: mup.Multipliers


def decode_weights(model: MiniCPM) -> DecodeWeights:
    """The weights of a model as `cpmjax.sampling.decode` wants them, placed on the mesh that is set, if one is.

    A layer has `query_key_value` [D, G * (R + 2) * K]: for each key-value head its R queries, its key and its value,
    so that a mesh that splits heads splits the matrix between them; `gate_up` [D, 2, F]; and `output`, `down` and the
    norms as they were.

    They have the compute type of the model, and so has the arithmetic; on a CPU, whose products of bfloat16 are slow,
    that is float32. Matrices that a narrower type holds without loss (those stored in it, or to be rounded to it) are
    `Narrow` there, which suits up to four rows; `widened` is for more. Both at once take 1.5 times what float32 takes.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype("float32") if on_cpu else jnp.dtype(model.compute.dtype)
    return arranged(model, dtype, narrow=on_cpu and jax.sharding.get_abstract_mesh().empty)


def widened(weights: DecodeWeights) -> DecodeWeights:
    """The same weights without any `Narrow`, for products of many rows; themselves, if they have none."""
    return _widened(weights) if any(map(_is_narrow, jax.tree.leaves(weights, is_leaf=_is_narrow))) else weights


def _is_narrow(leaf: object) -> bool:
    return isinstance(leaf, Narrow)


@jax.jit
def _widened(weights: DecodeWeights) -> DecodeWeights:
    dtype = weights.final_norm.dtype
    wide = jax.tree.map(lambda leaf: leaf.wide(dtype) if _is_narrow(leaf) else leaf, weights, is_leaf=_is_narrow)
    return wide._replace(embedding=wide.embedding.T) if _is_narrow(weights.embedding) else wide


@partial(jax.jit, static_argnames=("dtype", "narrow"))
def arranged(model: MiniCPM, dtype: jnp.dtype, narrow: bool) -> DecodeWeights:
    """`decode_weights` for this arithmetic, with `Narrow` matrices where they are wanted."""
    config, parameters, compute = model.config, model.parameters, jnp.dtype(model.compute.dtype)
    mesh = jax.sharding.get_abstract_mesh()

    def stored(leaf: jax.Array) -> jax.Array:
        """In the narrowest type that holds what the compute type makes of it."""
        return leaf if leaf.dtype.itemsize < compute.itemsize else leaf.astype(compute)

    def is_narrow(leaf: jax.Array) -> bool:
        return narrow and stored(leaf).dtype.itemsize < dtype.itemsize

    def matrix(leaf: jax.Array, axes: Axes) -> jax.Array | Narrow:
        """[input, output...]"""
        if is_narrow(leaf):
            return Narrow.of(stored(leaf))
        return constrain(padded(stored(leaf).astype(dtype), padded_shape(mesh, axes, leaf.shape)), axes)

    def norm(leaf: jax.Array) -> jax.Array:
        return constrain(leaf.astype(compute).astype(dtype), (None,))

    def layer(index: int) -> Layer:
        leaves: Tree = {name: leaf[index] for name, leaf in parameters["layers"].items()}

        def by_group(name: str) -> jax.Array:
            return leaves[name].reshape(config.width, config.kv, -1)

        grouped = jnp.concatenate([by_group("query"), by_group("key"), by_group("value")], axis=-1)
        return {
            "attention_norm": norm(leaves["attention_norm"]),
            "query_key_value": matrix(grouped.reshape(config.width, -1), ("width", "heads")),
            "output": matrix(leaves["output"], ("heads", "width")),
            "feed_forward_norm": norm(leaves["feed_forward_norm"]),
            "gate_up": matrix(jnp.stack([leaves["gate"], leaves["up"]], 1), ("width", None, "feed_forward")),
            "down": matrix(leaves["down"], ("feed_forward", "width")),
        }

    table_VD = parameters["embedding"]
    return DecodeWeights(
        Narrow.of(stored(table_VD).T) if is_narrow(table_VD) else matrix(table_VD, ("vocabulary", "width")),
        tuple(map(layer, range(config.layers))),
        norm(parameters["final_norm"]),
        None if config.tied else matrix(parameters["head"], ("width", "vocabulary")),
        model.multipliers,
    )
