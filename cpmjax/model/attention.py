"""Causal attention within documents: the contract every kernel fulfils, the plain one, and the plain one in chunks.

B batch, L queries, S keys, H heads, G key-value heads, R heads per key-value head, K head width, N chunks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 512


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


def attend_chunked(
    query_BLHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    queries: Places,
    keys: Places,
    chunk: int = CHUNK,
) -> jax.Array:
    """`attend` for so many queries at a time: of the scores [B, H, L, S] no more than [B, H, chunk, S] ever exist, in
    the backward pass neither. Memory grows with the length of a row and not with its square."""
    batch, length = query_BLHK.shape[:2]
    if length <= chunk:
        return attend(query_BLHK, key_BSGK, value_BSGK, queries, keys)

    def split(x_BL: jax.Array) -> jax.Array:
        beyond = [(0, -length % chunk if axis == 1 else 0) for axis in range(x_BL.ndim)]
        return jnp.pad(x_BL, beyond).reshape(batch, -1, chunk, *x_BL.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def mix(part: tuple[jax.Array, Places]) -> jax.Array:
        query_BLHK, queries = part
        return attend(query_BLHK, key_BSGK, value_BSGK, queries, keys)

    mixed_NBLHK = jax.lax.map(mix, jax.tree.map(split, (query_BLHK, queries)))
    return mixed_NBLHK.swapaxes(0, 1).reshape(batch, -1, *query_BLHK.shape[2:])[:, :length]
