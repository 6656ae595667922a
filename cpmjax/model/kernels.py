"""Attention kernels of accelerators, which jax brings along: splash on TPUs, triton and cudnn on GPUs.

Each is `attend_rows(query_BLHK, key_BLGK, value_BLGK, segments_BL)` of `cpmjax.model.attention` on the arrays of one
device. None has a second derivative: studies of curvature take `plain` or `chunked`.

B batch, L length, H heads, G key-value heads, K head width.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp

from cpmjax.model.attention import KEPT

_TRITON_BLOCK = 128
_LANES = 128  # a TPU's registers are that wide
_SPLASH_BLOCK = 512
# Of the forward pass, of the gradients of keys and values, of that of queries. (One kernel for all gradients, which jax
# has, too, would keep one of queries for each block of keys.)
_SPLASH_BLOCKS = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")


def _unnamed(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the kernels of GPUs hand to their backward pass without a name: of Triton's a call of the function that has
    the derivative, of cuDNN's a primitive."""
    return primitive.name in ("custom_vjp_call", "dot_product_attention_fwd_wrapper")


# A policy of `jax.checkpoint`: what any attention computes for its backward pass, which then runs none of it twice.
kept = jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.save_only_these_names(*KEPT), _unnamed)


def splash(
    query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array, interpret: bool = False
) -> jax.Array:
    """Splash attention (Pallas, TPU): memory linear in length, blocks of the future are skipped. `interpret` runs it on
    any platform, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    length, heads, width = query_BLHK.shape[1:]
    block = min(_SPLASH_BLOCK, length + -length % _LANES)
    query_BLHK, key_BLGK, value_BLGK, segments_BL = _whole_blocks(block, query_BLHK, key_BLGK, value_BLGK, segments_BL)
    padded = segments_BL.shape[1]
    blocks: dict[str, Any] = dict.fromkeys(_SPLASH_BLOCKS, block)
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * heads),
        block_sizes=splash_attention.BlockSizes(**blocks),
        residual_checkpoint_name=KEPT[-1],
        interpret=interpret,
    )
    query_BHLK, key_BGLK, value_BGLK = (x_BLHK.swapaxes(1, 2) for x_BLHK in (query_BLHK, key_BLGK, value_BLGK))
    segments = splash_attention.SegmentIds(segments_BL, segments_BL)
    mixed_BHLK = jax.vmap(kernel)(query_BHLK / math.sqrt(width), key_BGLK, value_BGLK, segments)
    return mixed_BHLK.swapaxes(1, 2)[:, :length]


def triton(
    query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array, interpret: bool = False
) -> jax.Array:
    """Flash attention in Pallas on Triton (GPU): memory linear in length, blocks of the future are skipped; key-value
    heads are repeated for it. `interpret` runs it on any platform, slowly."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    length, heads, width = query_BLHK.shape[1:]
    key_BLHK, value_BLHK = repeat_heads(key_BLGK, heads), repeat_heads(value_BLGK, heads)
    blocks = _whole_blocks(_TRITON_BLOCK, query_BLHK, key_BLHK, value_BLHK, segments_BL)
    return mha(*blocks, sm_scale=1 / math.sqrt(width), causal=True, interpret=interpret)[:, :length]


def has_triton() -> bool:
    """Whether this jax has the kernel of `triton`, which jax 0.12 calls deprecated."""
    try:
        return importlib.util.find_spec("jax.experimental.pallas.ops.gpu.attention") is not None
    except ImportError:
        return False


def cudnn(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """cuDNN's flash attention (GPU, 16 bits). Its public interface knows no documents, so they come as a mask, which
    cuDNN wants as numbers: [B, 1, L, L] in the type of the query, and its gradient once more. Memory grows with the
    square of the length, though not with heads."""
    length = query_BLHK.shape[1]
    query_BLHK, key_BLGK, value_BLGK, segments_BL = _whole_blocks(2, query_BLHK, key_BLGK, value_BLGK, segments_BL)
    same_document_B1LL = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    mixed_BLHK = jax.nn.dot_product_attention(
        query_BLHK, key_BLGK, value_BLGK, mask=same_document_B1LL, is_causal=True, implementation="cudnn"
    )
    return mixed_BLHK[:, :length]


def repeat_heads(x_BLGK: jax.Array, heads: int) -> jax.Array:
    """Key-value heads -> [B, L, H, K], one for each head."""
    return jnp.repeat(x_BLGK, heads // x_BLGK.shape[2], axis=2)


def _whole_blocks(block: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B, L, ...] filled up at the end, which is the future of all that is there, to a multiple of `block`."""
    extra = -arrays[0].shape[1] % block
    return tuple(jnp.pad(x_BL, [(0, 0), (0, extra)] + [(0, 0)] * (x_BL.ndim - 2)) for x_BL in arrays)
