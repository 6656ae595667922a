"""Causal attention within documents: the contract every kernel fulfils, and the plain one.

B batch, L queries, S keys, H heads, G key-value heads, R heads per key-value head, K head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Places(NamedTuple):
    """Where tokens stand: `segments` int32 [B, .] names the document (0: nothing there), `slots` int32 [B, .] counts
    along the row. A query sees the keys of its own document in slots up to its own."""

    segments: jax.Array
    slots: jax.Array


def attend(
    query_BLHK: jax.Array, key_BSGK: jax.Array, value_BSGK: jax.Array, queries: Places, keys: Places
) -> jax.Array:
    """Softmax attention with 1/sqrt(K) scores (MiniCPM keeps it under muP: K is the same at every width), the softmax
    in float32. Head h reads key-value head h // R. -> [B, L, H, K] in the type of the query."""
    batch, length, heads, width = query_BLHK.shape
    groups = key_BSGK.shape[2]
    query_BLGRK = query_BLHK.reshape(batch, length, groups, heads // groups, width)
    scores = jnp.einsum("blgrk,bsgk->bgrls", query_BLGRK, key_BSGK, preferred_element_type=jnp.float32)
    same_document_BLS = queries.segments[:, :, None] == keys.segments[:, None, :]
    not_later_BLS = queries.slots[:, :, None] >= keys.slots[:, None, :]
    visible = (same_document_BLS & not_later_BLS)[:, None, None]
    # A finite floor keeps rows of padding, which see nothing real, free of NaN.
    scores = jnp.where(visible, scores / math.sqrt(width), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(query_BLHK.dtype)
    mixed = jnp.einsum("bgrls,bsgk->blgrk", weights, value_BSGK)
    return mixed.reshape(batch, length, heads, width)
