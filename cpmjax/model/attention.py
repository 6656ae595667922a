"""Causal attention within documents: the contract every kernel fulfils, the plain one, and two that go by chunks of
queries, for whole rows (training; kernels and ring beside this file do the same) and for whatever a cache holds (a
prompt).

B batch, L queries, S keys, H heads, G key-value heads, R heads per key-value head, K head width, N chunks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

CHUNK = 512
_LONGEST_ROW = 1024
# What attention computes for the backward pass and a policy of `jax.checkpoint` may keep: with these, no weights.
KEPT = ("maximum", "total", "mixed")


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


def plain(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """`attend` for rows that are there from their first slot to their last: what all others are compared with."""
    places = _places(segments_BL)
    return attend(query_BLHK, key_BLGK, value_BLGK, places, places)


def attend_rows(
    query_BLHK: jax.Array,
    key_BLGK: jax.Array,
    value_BLGK: jax.Array,
    segments_BL: jax.Array,
    chunk: int = 128,
) -> jax.Array:
    """`plain` by chunks. Every kernel has this signature (`cpmjax.model.dispatch` chooses among them).

    A chunk of queries meets only the keys up to its own end: of the products about half are left. Between forward and
    backward pass no weights are kept, only what each query mixed, its maximum and its sum, from which the weights
    follow without another pass over the scores (Dao et al. 2022, FlashAttention, section 3.1). Rows longer than 1,024
    are left to `attend_chunked`: XLA may work at all chunks of a row at one time.
    """
    batch, length, heads, width = query_BLHK.shape
    groups = key_BLGK.shape[2]
    if length > _LONGEST_ROW:
        places = _places(segments_BL)
        return checkpoint_name(attend_chunked(query_BLHK, key_BLGK, value_BLGK, places, places), "mixed")
    query_BGRLK = query_BLHK.reshape(batch, length, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    # Slots last: gradients of keys and values then are products that XLA's CPU library is three times as fast at.
    key_BGKS, value_BGKS = (x_BLGK.transpose(0, 2, 3, 1) for x_BLGK in (key_BLGK, value_BLGK))
    keep = jax.checkpoint_policies.save_only_these_names(*KEPT)
    mixed = []
    for first in range(0, length, chunk):
        last = min(first + chunk, length)
        mix = jax.checkpoint(partial(_mix, first=first), policy=keep)
        mixed.append(
            mix(query_BGRLK[:, :, :, first:last], key_BGKS[..., :last], value_BGKS[..., :last], segments_BL[:, :last])
        )
    mixed_BGRLK = jnp.concatenate(mixed, axis=3).astype(query_BLHK.dtype)
    return mixed_BGRLK.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def _places(segments_BL: jax.Array) -> Places:
    return Places(segments_BL, jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32), segments_BL.shape))


def _mix(
    query_BGRLK: jax.Array, key_BGKS: jax.Array, value_BGKS: jax.Array, segments_BS: jax.Array, first: int
) -> jax.Array:
    """Queries in the slots from `first` to that of the last key -> float32 [B, G, R, L, K]."""
    batch, groups, repeats, length, width = query_BGRLK.shape
    slots = jnp.arange(segments_BS.shape[1])
    # One matrix for each key-value head (M: its R heads' queries): XLA copies the scores of any more axes.
    query_BGMK = query_BGRLK.reshape(batch, groups, -1, width)
    scores_BGMS = jnp.einsum("bgmk,bgks->bgms", query_BGMK, key_BGKS, preferred_element_type=jnp.float32)
    same_document_BLS = segments_BS[:, first : first + length, None] == segments_BS[:, None, :]
    visible_BLS = same_document_BLS & (slots[first : first + length, None] >= slots)
    visible_B1MS = jnp.tile(visible_BLS, (1, repeats, 1))[:, None]
    scores_BGMS = jnp.where(visible_B1MS, scores_BGMS / math.sqrt(width), -1e30)
    maximum = checkpoint_name(jax.lax.stop_gradient(jnp.max(scores_BGMS, axis=-1, keepdims=True)), "maximum")
    weights_BGMS = jnp.exp(scores_BGMS - maximum)
    total = checkpoint_name(jnp.sum(weights_BGMS, axis=-1, keepdims=True), "total")
    weights_BGMS = weights_BGMS.astype(value_BGKS.dtype)
    mixed = jnp.einsum("bgms,bgks->bgmk", weights_BGMS, value_BGKS, preferred_element_type=jnp.float32)
    return (checkpoint_name(mixed, "mixed") / total).reshape(query_BGRLK.shape)
