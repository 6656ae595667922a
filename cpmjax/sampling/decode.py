"""Prompts in, tokens out: one compiled program of a prefill and a loop, greedy or at a temperature.

B batch, P prompt length, T new tokens, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from cpmjax.model import cache as caches
from cpmjax.model.transformer import MiniCPM


@partial(jax.jit, static_argnames="new_tokens")
def generate(
    model: MiniCPM,
    prompts_BP: jax.Array,
    lengths_B: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    end: jax.Array,
    new_tokens: int,
) -> jax.Array:
    """Continues prompts (int32, padded on the right; `lengths_B` says how far each is real) -> int32 [B, T].

    Temperature 0 is greedy. A row that has produced the token `end` goes on as `end`; the loop stops when all have.
    Compiles once for each B, P and T.
    """
    batch, prompt = prompts_BP.shape
    cache: caches.Cache | None = caches.empty(model.config, batch, prompt + new_tokens, model.compute.dtype)
    slots_BP = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (batch, prompt))
    segments_BP = (slots_BP < lengths_B[:, None]).astype(jnp.int32)
    hidden_BPD, cache, _ = model.trunk(model.embed(prompts_BP), slots_BP, segments_BP, cache, slots_BP)
    last_BD = hidden_BPD[jnp.arange(batch), lengths_B - 1]

    def pick(hidden_BD: jax.Array, index: jax.Array) -> jax.Array:
        logits_BV = model.head(hidden_BD)
        safe = jnp.where(temperature > 0, temperature, 1.0)
        sampled_B = jax.random.categorical(jax.random.fold_in(key, index), logits_BV / safe)
        return jnp.where(temperature > 0, sampled_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)

    def going_on(state) -> jax.Array:
        index, tokens_BT, _, _ = state
        ended_B = jnp.any(tokens_BT == end, axis=1)
        return (index < new_tokens) & ~jnp.all(ended_B)

    def advance(state):
        index, tokens_BT, hidden_BD, cache = state
        token_B = pick(hidden_BD, index)
        tokens_BT = tokens_BT.at[:, index].set(token_B)
        slots_B1 = (lengths_B + index)[:, None]
        hidden_B1D, cache, _ = model.trunk(
            model.embed(token_B[:, None]), slots_B1, jnp.ones_like(slots_B1), cache, slots_B1
        )
        return index + 1, tokens_BT, hidden_B1D[:, 0], cache

    # -1 is no token, so that places not reached yet do not look like an end.
    tokens_BT = jnp.full((batch, new_tokens), -1, jnp.int32)
    _, tokens_BT, _, _ = jax.lax.while_loop(going_on, advance, (jnp.int32(0), tokens_BT, last_BD, cache))
    ended_BT = jnp.cumsum(tokens_BT == end, axis=1) > 0
    return jnp.where(ended_BT | (tokens_BT < 0), end, tokens_BT)
