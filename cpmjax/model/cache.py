"""The key-value cache of incremental decoding, a pytree.

N layers, B batch, S slots, G key-value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.run.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys (already rotated) and values: [N, B, S, G, K], or one layer's [B, S, G, K]."""

    key: jax.Array
    value: jax.Array

    def write(self, key_BLGK: jax.Array, value_BLGK: jax.Array, slots_BL: jax.Array) -> LayerCache:
        """One layer's cache with new tokens in the given slots."""
        rows = jnp.arange(slots_BL.shape[0])[:, None]
        return LayerCache(
            self.key.at[rows, slots_BL].set(key_BLGK.astype(self.key.dtype)),
            self.value.at[rows, slots_BL].set(value_BLGK.astype(self.value.dtype)),
        )


class Cache(NamedTuple):
    layers: LayerCache
    segments: jax.Array  # int32 [B, S]: 0 where nothing was written yet


def empty(config: ModelConfig, batch: int, slots: int, dtype: str) -> Cache:
    shape = (config.layers, batch, slots, config.kv, config.head)
    layers = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return Cache(layers, jnp.zeros((batch, slots), jnp.int32))
