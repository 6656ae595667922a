"""Chunked cross entropy: a loss for each token, without ever holding the logits of all of them.

B batch, L length, D width, V vocabulary, v of it on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import divides, padded, padded_shape, partition, split_axes


class TokenLosses(NamedTuple):
    """float32 [B, L] each."""

    loss: jax.Array  # nats: -log p(target)
    logsumexp: jax.Array  # of the logits; its square is the z-loss
    logit_rms: jax.Array  # root mean square over the vocabulary


def batch_losses(model: MiniCPM, batch: dict[str, Any]) -> TokenLosses:
    """Of each token of a batch: a dict of [B, L] arrays, tokens, targets, positions and segments (int32)."""
    hidden_BLD, _ = model.trunk(model.embed(batch["tokens"]), batch["positions"], batch["segments"])
    return token_losses(model, hidden_BLD, batch["targets"])


@jax.jit
def mean_loss(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    """Nats a token of a batch, its tokens counted by batch["weights"]; float32 scalar. Compiles once a shape."""
    weights_BL = batch["weights"]
    return jnp.sum(weights_BL * batch_losses(model, batch).loss) / jnp.sum(weights_BL)


def token_losses(model: MiniCPM, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
    """Cross entropy of the head's logits against int32 targets.

    On a device, at most `compute.loss_chunk` tokens (at least one position of each row) have logits at one time, in the
    backward pass too: a chunk is a slice along the length, and is computed again for the gradient.
    """
    weight_DV, splits = model.head_weight, split_axes("rows", "length", "vocabulary")
    if not splits or not divides(("rows", "length"), targets_BL.shape):
        return _in_chunks(partial(_losses, model, weight_DV), model, hidden_BLD, targets_BL)
    in_parts = split_axes("vocabulary")

    # Each device goes through its own tokens with the whole width of the head, so that the head's gradient is summed
    # over devices once: left to the compiler it would be once for each chunk.
    def local(weight_Dv: jax.Array, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
        weight_Dv = weight_Dv.astype(hidden_BLD.dtype)
        for axis in split_axes("width"):
            weight_Dv = jax.lax.all_gather(weight_Dv, axis, axis=0, tiled=True)
        # Its own on each device from here on: here is then where the sum is taken, after the loop over chunks.
        same = tuple(axis for axis in splits if axis not in split_axes("width", "vocabulary"))
        weight_Dv = jax.lax.pcast(weight_Dv, same, to="varying")
        losses = partial(_losses_in_parts if in_parts else _losses, model, weight_Dv)
        return _in_chunks(losses, model, hidden_BLD, targets_BL)

    axes, tokens = ("width", "vocabulary" if in_parts else None), partition(("rows", "length"))
    on_devices = jax.shard_map(
        local, in_specs=(partition(axes), partition(("rows", "length", None)), tokens), out_specs=tokens
    )
    whole_parts = padded_shape(jax.sharding.get_abstract_mesh(), axes, weight_DV.shape)
    return on_devices(padded(weight_DV, whole_parts), hidden_BLD, targets_BL)


def _in_chunks(
    losses: Callable[[jax.Array, jax.Array], TokenLosses], model: MiniCPM, hidden_BLD: jax.Array, targets_BL: jax.Array
) -> TokenLosses:
    batch, length, width = hidden_BLD.shape
    positions = max(1, model.compute.loss_chunk // batch)
    if positions >= length:
        return losses(hidden_BLD, targets_BL)
    chunks = -(-length // positions)
    padding = chunks * positions - length
    hidden_BLD = jnp.pad(hidden_BLD, ((0, 0), (0, padding), (0, 0)))
    targets_BL = jnp.pad(targets_BL, ((0, 0), (0, padding)))
    hidden = jnp.moveaxis(hidden_BLD.reshape(batch, chunks, positions, width), 1, 0)
    targets = jnp.moveaxis(targets_BL.reshape(batch, chunks, positions), 1, 0)
    chunk = jax.checkpoint(lambda xs: losses(*xs), prevent_cse=False)
    found = jax.lax.map(chunk, (hidden, targets))
    return TokenLosses(*(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in found))


def _losses(model: MiniCPM, weight_DV: jax.Array, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
    logits_BLV = model.head(hidden_BLD, weight_DV)
    logsumexp_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    rms_BL = jnp.sqrt(jnp.mean(jax.lax.stop_gradient(logits_BLV) ** 2, axis=-1))
    return TokenLosses(logsumexp_BL - target_BL, logsumexp_BL, rms_BL)


def _losses_in_parts(model: MiniCPM, weight_Dv: jax.Array, hidden_BLD: jax.Array, targets_BL: jax.Array) -> TokenLosses:
    """`_losses` where each device has a part of the vocabulary, and the last one perhaps some padding."""
    axes, vocabulary, part = split_axes("vocabulary"), model.config.vocabulary, weight_Dv.shape[1]
    first = jax.lax.axis_index(axes) * part
    real_v = first + jnp.arange(part) < vocabulary
    logits_BLv = jnp.where(real_v, model.head(hidden_BLD, weight_Dv), -1e30)
    maximum_BL = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits_BLv), axis=-1), axes)
    total_BL = jax.lax.psum(jnp.sum(jnp.exp(logits_BLv - maximum_BL[..., None]), axis=-1), axes)
    logsumexp_BL = maximum_BL + jnp.log(total_BL)
    places_BL = targets_BL - first
    here_BL = (places_BL >= 0) & (places_BL < part)
    found_BL = jnp.take_along_axis(logits_BLv, jnp.where(here_BL, places_BL, 0)[..., None], axis=-1)[..., 0]
    target_BL = jax.lax.psum(jnp.where(here_BL, found_BL, 0), axes)
    squares_BLv = jnp.where(real_v, jax.lax.stop_gradient(logits_BLv) ** 2, 0)
    rms_BL = jnp.sqrt(jax.lax.psum(jnp.sum(squares_BLv, axis=-1), axes) / vocabulary)
    return TokenLosses(logsumexp_BL - target_BL, logsumexp_BL, rms_BL)
