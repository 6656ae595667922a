"""Rotary position embeddings, half-split (NeoX order), in float32: plain, linear and dynamic NTK.

B batch, L length, H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cpmjax.run.config import ModelConfig


def tables(config: ModelConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, L, 1, K/2] of the angles of int32 positions.

    `linear` divides positions by rope_factor. `dynamic` (NTK) raises the base of a row whose longest position reaches
    past `context`, c: theta * (factor * length / c - (factor - 1)) ** (K / (K - 2)).
    """
    width = config.head
    positions = positions_BL.astype(jnp.float32)
    base = jnp.float32(config.rope_theta)
    if config.rope_scaling == "linear":
        positions = positions / config.rope_factor
    elif config.rope_scaling == "dynamic":
        length_B11 = (positions_BL.max(axis=-1) + 1).astype(jnp.float32)[:, None, None]
        stretch = config.rope_factor * length_B11 / config.context - (config.rope_factor - 1)
        base = jnp.where(length_B11 > config.context, base * stretch ** (width / (width - 2)), base)
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    angles = positions[:, :, None] / base**exponents
    return jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]


def rotate(x_BLHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + K/2]) by its angle, in float32; the result has the type of x."""
    cos, sin = tables
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)
