"""The vocabulary is padded where it is placed, and nowhere else.

An array that a mesh does not divide cannot cross the border of a jitted function, while inside of one it can: there XLA
pads and masks by itself. So what stays on the mesh from step to step has its axis of the vocabulary filled with zeros
up to a multiple of the parts it is split into (`cpmjax.parallel.sharding.padded_shape`), and whoever computes with it
cuts it to its true size first. Loss, gradients, norms and means are those of the model that was declared, and the
padding stays zero. Where the mesh divides the vocabulary, or does not split it, nothing of this is in any program.

What leaves the mesh (checkpoints, the sampler) has its true size, and its vocabulary whole: it is *at rest*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from cpmjax.model.parameters import axes_of, flat, owner, specs
from cpmjax.parallel import sharding
from cpmjax.run.config import ModelConfig
from cpmjax.training.offload import fetched


def unpadded(config: ModelConfig, tree: Any) -> Any:
    """Parameters, or what holds trees of them (a `TrainState`, an optimizer's), at their true sizes. For use in jit."""
    return _for_padded(config, lambda x, _, shape: _cut(x, shape), tree)


def padded(tree: Any, like: Any) -> Any:
    """A tree whose leaves are filled with zeros up to the shapes of those of another one. For use in jit."""
    return jax.tree.map(lambda x, other: sharding.padded(x, other.shape), tree, like)


def at_rest(config: ModelConfig, tree: Any) -> Any:
    """The arrays of a tree, at their true sizes and split over the mesh still."""

    def move(x: Any, axes: sharding.Axes, shape: tuple[int, ...]) -> jax.Array:
        place = sharding.at_rest(x.sharding.mesh, axes, shape)
        cut = jax.jit(lambda x: _cut(fetched(x), shape), out_shardings=place)
        return cut(x)

    return _for_padded(config, move, tree)


def abstract_at_rest(config: ModelConfig, abstract: Any) -> Any:
    """What `at_rest` makes of arrays like these `jax.ShapeDtypeStruct`s: what a checkpoint is read as."""

    def describe(x: jax.ShapeDtypeStruct, axes: sharding.Axes, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        place = sharding.at_rest(x.sharding.mesh, axes, shape)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

    return _for_padded(config, describe, abstract)


def from_rest(tree: Any, wanted: Any) -> Any:
    """The way back: arrays padded and placed as `wanted`, a tree of `jax.ShapeDtypeStruct`s, says."""

    def move(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == like.shape:
            return x
        return jax.jit(sharding.padded, static_argnums=1, out_shardings=like.sharding)(x, like.shape)

    return jax.tree.map(move, tree, wanted)


def _for_padded(config: ModelConfig, function: Callable[[Any, sharding.Axes, tuple[int, ...]], Any], tree: Any) -> Any:
    """The tree with function(leaf, its logical axes, its true shape) in the place of each leaf that is padded."""
    declared = flat(specs(config))

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        spec = declared.get(owner(path))
        if spec is None or "vocabulary" not in spec.axes or x.ndim != len(spec.shape):
            return x
        place = spec.axes.index("vocabulary")
        if x.shape[place] <= config.vocabulary:
            return x
        shape = (*x.shape[:place], config.vocabulary, *x.shape[place + 1 :])
        axes = axes_of(spec, shape)
        return x if axes is None else function(x, axes, shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.slice(x, [0] * x.ndim, shape)
