"""Chunked cross entropy: a loss for each token, without ever holding the logits of all of them.

B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.model.transformer import MiniCPM


class TokenLosses(NamedTuple):
    """float32 [B, L] each."""

    loss: jax.Array  # nats: -log p(target)
    logsumexp: jax.Array  # of the logits; its square is the z-loss
    logit_rms: jax.Array  # root mean square over the vocabulary


def token_losses(model: MiniCPM, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
    """Cross entropy of the head's logits against int32 targets.

    At most `compute.loss_chunk` tokens (at least one position of each row) have logits at one time, in the backward
    pass too: a chunk is a slice along the length, so that rows stay on their devices, and is computed again for the
    gradient.
    """
    batch, length, width = hidden_BLD.shape
    positions = max(1, model.compute.loss_chunk // batch)
    if positions >= length:
        return _chunk_losses(model, hidden_BLD, targets_BL)
    chunks = -(-length // positions)
    padding = chunks * positions - length
    hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, padding), (0, 0)))
    targets_BL = jnp.pad(targets_BL, ((0, 0), (0, padding)))
    hidden = jnp.moveaxis(hidden_BLD.reshape(batch, chunks, positions, width), 1, 0)
    targets = jnp.moveaxis(targets_BL.reshape(batch, chunks, positions), 1, 0)
    chunk = jax.checkpoint(lambda xs: _chunk_losses(model, *xs), prevent_cse=False)
    losses = jax.lax.map(chunk, (hidden, targets))
    return TokenLosses(*(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in losses))


def _chunk_losses(model: MiniCPM, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
    logits_BLV = model.head(hidden_BLD)
    logsumexp_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    rms_BL = jnp.sqrt(jnp.mean(jax.lax.stop_gradient(logits_BLV) ** 2, axis=-1))
    return TokenLosses(logsumexp_BL - target_BL, logsumexp_BL, rms_BL)
