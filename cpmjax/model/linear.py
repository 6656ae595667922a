"""The only place a weight meets an activation."""

from __future__ import annotations

import jax


def linear(leaf: jax.Array, x: jax.Array) -> jax.Array:
    """x [..., input] times a leaf [input, output], in the type of x -> [..., output]."""
    return x @ leaf.astype(x.dtype)
