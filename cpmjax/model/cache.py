"""The key-value cache of incremental decoding, a pytree: in the type of its arrays, int8 with a scale for each vector.

Slots lie within their head: attention over the cache reads memory in order, several times faster on a CPU than with
heads within slots.

B batch, S slots, L new tokens, H heads, G key-value heads, R heads per key-value head, K head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.parallel.sharding import constrain
from cpmjax.run.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys (already rotated) and values of one layer.

    Scales are float32, one for each row, head and slot; None unless the arrays are int8.
    """

    key_BGSK: jax.Array
    value_BGSK: jax.Array
    key_scale_BGS: jax.Array | None = None
    value_scale_BGS: jax.Array | None = None

    def write(self, key_BLGK: jax.Array, value_BLGK: jax.Array, slots_BL: jax.Array) -> LayerCache:
        """The cache with new tokens in the given slots; in place where jit may reuse its memory."""
        batch, groups = self.key_BGSK.shape[:2]
        places = (jnp.arange(batch)[:, None, None], jnp.arange(groups)[None, :, None], slots_BL[:, None, :])
        new = _stored(key_BLGK, value_BLGK, self.key_BGSK.dtype)
        return _placed(jax.tree.map(lambda old, x: old.at[places].set(x), self, new))

    def attend(self, query_BHK: jax.Array, last_B: jax.Array) -> jax.Array:
        """What one query a row draws from the slots up to its own, `last_B` -> [B, H, K] in the type of the query.

        As `cpmjax.model.attention.attend`. Scales of an int8 cache leave the products: each belongs to a whole slot.
        """
        batch, heads, width = query_BHK.shape
        groups, slots = self.key_BGSK.shape[1:3]
        dtype = jnp.promote_types(query_BHK.dtype, self.key_BGSK.dtype)
        query_BGRK = query_BHK.reshape(batch, groups, heads // groups, width).astype(dtype)
        key_BGSK, value_BGSK = self.key_BGSK.astype(dtype), self.value_BGSK.astype(dtype)
        scores = jnp.einsum("bgrk,bgsk->bgrs", query_BGRK, key_BGSK, preferred_element_type=jnp.float32)
        if self.key_scale_BGS is not None:
            scores = scores * self.key_scale_BGS[:, :, None]
        visible_BS = jnp.arange(slots) <= last_B[:, None]
        scores = jnp.where(visible_BS[:, None, None], scores / math.sqrt(width), -1e30)
        weights = jax.nn.softmax(scores, axis=-1)
        if self.value_scale_BGS is not None:
            weights = weights * self.value_scale_BGS[:, :, None]
        mixed_BGRK = jnp.einsum("bgrs,bgsk->bgrk", weights.astype(dtype), value_BGSK)
        return mixed_BGRK.reshape(batch, heads, width).astype(query_BHK.dtype)


def of_prompt(key_BLGK: jax.Array, value_BLGK: jax.Array, slots: int, dtype: jnp.dtype) -> LayerCache:
    """One layer's cache with L tokens in its first slots, the others zero."""

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, slots - x.shape[2] if axis == 2 else 0) for axis in range(x.ndim)])

    return _placed(jax.tree.map(padded, _stored(key_BLGK, value_BLGK, dtype)))


def row_bytes(config: ModelConfig, slots: int, dtype: jnp.dtype) -> int:
    """Bytes of one row's cache, all layers."""
    vector = config.head * dtype.itemsize + (4 if dtype == jnp.int8 else 0)
    return 2 * config.layers * slots * config.kv * vector


def _stored(key_BLGK: jax.Array, value_BLGK: jax.Array, dtype: jnp.dtype) -> LayerCache:
    """New tokens in the layout and type of the cache."""
    key_BGLK, value_BGLK = key_BLGK.swapaxes(1, 2), value_BLGK.swapaxes(1, 2)
    if dtype != jnp.int8:
        return LayerCache(key_BGLK.astype(dtype), value_BGLK.astype(dtype))
    (key_BGLK, key_scale), (value_BGLK, value_scale) = _quantised(key_BGLK), _quantised(value_BGLK)
    return LayerCache(key_BGLK, value_BGLK, key_scale, value_scale)


def _placed(layer: LayerCache) -> LayerCache:
    return jax.tree.map(lambda x: constrain(x, ("rows", "heads", None, None)[: x.ndim]), layer)


def _quantised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of any leading shape -> int8, and the float32 scale that their largest entry makes 127."""
    x32 = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x32), axis=-1) / 127
    steps = x32 / jnp.where(scale > 0, scale, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale
