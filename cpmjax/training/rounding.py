"""The state of an optimizer at rest in half the memory.

What belongs to a parameter (moments, momenta, means over rows and columns) is kept in bfloat16 and widened to float32
for each update; the update itself is made with the moments before they are rounded. Rounding is stochastic: up or down
with the probabilities that make the mean right. To nearest, a moment that forgets more slowly than the 8 bits of
bfloat16 can show (half a step of the last bit is 0.2 to 0.4 per cent: betas above 0.996) would stand still. The draws
derive from the number of the update, so that a run that is resumed rounds as one that is not. Parameters, the z of
schedule-free AdamW and counts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpmjax.model.parameters import owner


def at_rest_in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """The rule with its state in bfloat16, of the same structure otherwise. The rule counts its updates in int32."""

    def init(params: Any) -> Any:
        return map_moments(lambda x, *_: x.astype(jnp.bfloat16), rule.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = map_moments(lambda x, *_: x.astype(jnp.float32), state)
        updates, new = rule.update(grads, wide, params)
        return updates, map_moments(lambda x, _, key: stochastically(x, key), new)

    return optax.GradientTransformation(init, update)


def stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16: to one of the two neighbours, by chance, with x as the expected value."""
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def map_moments(function: Callable[[Any, tuple[Any, ...], jax.Array], Any], state: Any) -> Any:
    """function(leaf, its path, a key of this leaf and update) on every leaf that belongs to a parameter."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    count = jnp.max(next(leaf for _, leaf in leaves if leaf.dtype == jnp.int32))  # one a layer, or one
    key = jax.random.fold_in(jax.random.key(0), count)
    changed = [
        function(leaf, path, jax.random.fold_in(key, number)) if owner(path) else leaf
        for number, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, changed)
