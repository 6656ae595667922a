"""Specs and a key -> parameters. Pure: its caller jits it with shardings, so that no array is ever full-size."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from cpmjax.model.mup import LeafScales, Scales, scales
from cpmjax.model.parameters import ParamSpec, Tree, path_name, specs
from cpmjax.run.config import ModelConfig


def initialise(config: ModelConfig, key: jax.Array, given: Scales | None = None) -> Tree:
    """Parameters in float32, each drawn from a key of its own: adding one parameter leaves the others as they were.

    `given` replaces the scales of the configuration's own parametrisation.
    """

    def leaf(path: tuple, spec: ParamSpec, scale: LeafScales) -> jax.Array:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return scale.mean + scale.std * jax.random.normal(leaf_key, spec.shape, jnp.float32)

    chosen = given or scales(config)  # the optimizer is nothing to an initial value
    return jax.tree_util.tree_map_with_path(leaf, specs(config), chosen.leaves)
