"""Specs and a key -> parameters. Pure: its caller jits it with shardings, so that no array is ever full-size."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp

from cpmjax.model.mup import init_std, parametrisation
from cpmjax.model.parameters import ParamSpec, Tree, path_name, specs
from cpmjax.run.config import ModelConfig


def initialise(config: ModelConfig, key: jax.Array) -> Tree:
    """Parameters in float32, each drawn from a key of its own: adding one parameter leaves the others as they were."""

    def leaf(path: tuple, spec: ParamSpec) -> jax.Array:
        constant = parametrisation(config).rule(spec.role).constant
        if constant is not None:
            return jnp.full(spec.shape, constant, jnp.float32)
        leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
        return init_std(config, spec) * jax.random.normal(leaf_key, spec.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, specs(config))
