"""Prompts in, tokens out: pure functions on an explicit state. One program fills it, one moves it on by some steps.

Every row counts its own positions and is told what to do by its own entries of arrays: padding and neighbours never
enter, and no request needs a program of its own. Layers are unrolled.

B batch, P prompt length, T new tokens, C top log-probabilities, J stop ids, D width, H heads, G key-value heads,
R heads per key-value head, K head width, F feed-forward, V vocabulary, L length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.model import cache as caches
from cpmjax.model import rotary
from cpmjax.model.attention import Places, attend_chunked
from cpmjax.model.cache import LayerCache
from cpmjax.model.linear import Narrow, linear
from cpmjax.model.transformer import ACTIVATION, rms_norm
from cpmjax.parallel.sharding import constrain
from cpmjax.run.config import ModelConfig
from cpmjax.sampling.logits import adjust, choose, log_probabilities, top_log_probabilities
from cpmjax.sampling.options import Options
from cpmjax.sampling.weights import DecodeWeights, Layer

_SCORED = 16  # places of a prompt whose logits exist at one time; divides P


class Request(NamedTuple):
    """What is asked of each row, and stays as it is while the state moves on."""

    options: Options
    stop_ids_BJ: jax.Array  # int32: a row ends with any of them; -1 is none
    limit_B: jax.Array  # int32: and after this many new tokens; at most T


class DecodeState(NamedTuple):
    """Between two tokens: every array has a row's entries in its own row."""

    layers: tuple[LayerCache, ...]  # of P + T slots
    hidden_BD: jax.Array  # of the last token, after the final norm: the next one's logits are not computed yet
    length_B: jax.Array  # int32: tokens so far, prompt and new
    ended_B: jax.Array  # bool: no more tokens
    prompt_BV: jax.Array  # bool: which tokens the prompt has
    counts_BV: jax.Array  # int32: how often each was generated
    generated_B: jax.Array  # int32: how many entries of the following are written
    tokens_BT: jax.Array  # int32
    log_probabilities_BT: jax.Array  # float32: of the tokens, under the model itself, before any option
    top_values_BTC: jax.Array  # float32: the largest log-probabilities there
    top_ids_BTC: jax.Array  # int32


@partial(jax.jit, static_argnames=("config", "new_tokens", "cache_dtype", "top", "score"))
def prefill(
    config: ModelConfig,
    weights: DecodeWeights,
    tokens_BP: jax.Array,
    length_B: jax.Array,
    *,
    new_tokens: int,
    cache_dtype: str,
    top: int = 0,
    score: bool = False,
) -> tuple[DecodeState, jax.Array | None]:
    """Reads prompts (int32, padded on the right, P a multiple of 16; `length_B` >= 1 says how far each is real).

    -> a state with room for `new_tokens`, T, and `top`, C; and, with `score`, the float32 log-probability [B, P] of
    each token given those before it, of no meaning at place 0 and in the padding. Compiles once for each B, P and
    each value of the keywords.
    """
    batch, prompt = tokens_BP.shape
    slots_BP = jnp.broadcast_to(jnp.arange(prompt, dtype=jnp.int32), (batch, prompt))
    real_BP = slots_BP < length_B[:, None]
    places = Places(real_BP.astype(jnp.int32), slots_BP)
    # Padding repeats the last position: dynamic rotary scaling follows the longest of a row.
    tables = rotary.tables(config, jnp.minimum(slots_BP, length_B[:, None] - 1))

    def mix(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array) -> tuple[jax.Array, LayerCache]:
        cache = caches.of_prompt(key_BLGK, value_BLGK, prompt + new_tokens, jnp.dtype(cache_dtype))
        return attend_chunked(query_BLHK, key_BLGK, value_BLGK, places, places), cache

    x_BPD, layers = embed(weights, tokens_BP), []
    for leaves in weights.layers:
        x_BPD, cache = block(config, weights, leaves, x_BPD, tables, mix)
        layers.append(cache)
    x_BPD = rms_norm(weights.final_norm, x_BPD, config.norm_epsilon)

    rows, vocabulary = jnp.arange(batch), config.vocabulary
    state = DecodeState(
        layers=tuple(layers),
        hidden_BD=x_BPD[rows, length_B - 1],
        length_B=length_B,
        ended_B=jnp.zeros(batch, bool),
        prompt_BV=jnp.zeros((batch, vocabulary), bool).at[rows[:, None], tokens_BP].max(real_BP),
        counts_BV=jnp.zeros((batch, vocabulary), jnp.int32),
        generated_B=jnp.zeros(batch, jnp.int32),
        tokens_BT=jnp.zeros((batch, new_tokens), jnp.int32),
        log_probabilities_BT=jnp.zeros((batch, new_tokens)),
        top_values_BTC=jnp.zeros((batch, new_tokens, top)),
        top_ids_BTC=jnp.zeros((batch, new_tokens, top), jnp.int32),
    )
    return state, _score(config, weights, x_BPD, tokens_BP) if score else None


@jax.jit
def take(state: DecodeState, rows: jax.Array) -> DecodeState:
    """The state with other rows: each entry of int32 `rows` names one that it had. So samples share a prefill."""
    return jax.tree.map(lambda x: x[rows], state)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode(
    config: ModelConfig, weights: DecodeWeights, state: DecodeState, request: Request, steps: jax.Array
) -> DecodeState:
    """Moves the state on by at most `steps` tokens a row, fewer if every row has ended; its memory is reused.

    A row of limit 0 has ended before it begins. Compiles once for each set of shapes: B, P + T, T, C, J and those of
    the options.
    """
    rows = jnp.arange(state.length_B.shape[0])

    def going_on(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        step, state = carry
        return (step < steps) & ~jnp.all(state.ended_B)

    def advance(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        step, state = carry
        logits_BV = head(config, weights, state.hidden_BD)
        adjusted_BV = adjust(logits_BV, request.options, state.prompt_BV, state.counts_BV)
        token_B = choose(adjusted_BV, request.options, state.length_B)
        # What a row that has ended would write falls beyond the end of each array, and is dropped.
        place_B = jnp.where(state.ended_B, state.tokens_BT.shape[1], state.generated_B)
        going_B = (~state.ended_B).astype(jnp.int32)

        def write(x: jax.Array, value: jax.Array) -> jax.Array:
            return x.at[rows, place_B].set(value, mode="drop")

        if state.top_ids_BTC.shape[2]:
            values_BC, ids_BC = top_log_probabilities(logits_BV, state.top_ids_BTC.shape[2])
            state = state._replace(
                top_values_BTC=write(state.top_values_BTC, values_BC), top_ids_BTC=write(state.top_ids_BTC, ids_BC)
            )
        stopped_B = jnp.any(token_B[:, None] == request.stop_ids_BJ, axis=1)
        generated_B = state.generated_B + going_B
        slot_B = state.length_B  # of the new token; a row that has ended writes over what nobody will read
        layers, hidden_BD = read(config, weights, state.layers, token_B, slot_B)
        state = state._replace(
            layers=layers,
            hidden_BD=hidden_BD,
            length_B=state.length_B + going_B,
            ended_B=state.ended_B | stopped_B | (generated_B >= request.limit_B),
            counts_BV=state.counts_BV.at[rows, token_B].add(going_B),
            generated_B=generated_B,
            tokens_BT=write(state.tokens_BT, token_B),
            log_probabilities_BT=write(state.log_probabilities_BT, log_probabilities(logits_BV, token_B)),
        )
        return step + 1, state

    state = state._replace(ended_B=state.ended_B | (state.generated_B >= request.limit_B))
    return jax.lax.while_loop(going_on, advance, (jnp.int32(0), state))[1]


def embed(weights: DecodeWeights, tokens: jax.Array) -> jax.Array:
    """int32 tokens of any shape -> [..., D] in the type of the arithmetic."""
    table, dtype = weights.embedding, weights.final_norm.dtype
    x = table.of_outputs(tokens, dtype) if isinstance(table, Narrow) else table[tokens]
    return x * jnp.asarray(weights.multipliers.embedding, dtype)


def head(config: ModelConfig, weights: DecodeWeights, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] after the final norm -> float32 logits [..., V]."""
    leaf = weights.head
    if leaf is None:
        leaf = weights.embedding if isinstance(weights.embedding, Narrow) else weights.embedding.T
    logits = linear(leaf, hidden * jnp.asarray(weights.multipliers.logits, hidden.dtype)).astype(jnp.float32)
    return logits[..., : config.vocabulary]


def block(
    config: ModelConfig,
    weights: DecodeWeights,
    leaves: Layer,
    x_BLD: jax.Array,
    tables: tuple[jax.Array, jax.Array],
    mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, LayerCache]],
) -> tuple[jax.Array, LayerCache]:
    """One layer on decode leaves; `mix` is its attention, from query [B, L, H, K], key and value [B, L, G, K]."""
    batch, length, _ = x_BLD.shape
    scale = jnp.asarray(weights.multipliers.residual, x_BLD.dtype)

    h_BLD = rms_norm(leaves["attention_norm"], x_BLD, config.norm_epsilon)
    fused = linear(leaves["query_key_value"], h_BLD).reshape(batch, length, config.kv, -1, config.head)
    query_BLHK = rotary.rotate(fused[..., :-2, :].reshape(batch, length, config.heads, config.head), tables)
    mixed_BLHK, cache = mix(query_BLHK, rotary.rotate(fused[..., -2, :], tables), fused[..., -1, :])
    attention_BLD = linear(leaves["output"], mixed_BLHK.reshape(batch, length, -1))
    x_BLD = constrain(x_BLD + attention_BLD * scale, ACTIVATION)

    h_BLD = rms_norm(leaves["feed_forward_norm"], x_BLD, config.norm_epsilon)
    gate_up_BL2F = linear(leaves["gate_up"], h_BLD)
    gated_BLF = jax.nn.silu(gate_up_BL2F[..., 0, :]) * gate_up_BL2F[..., 1, :]
    x_BLD = constrain(x_BLD + linear(leaves["down"], gated_BLF) * scale, ACTIVATION)
    return x_BLD, cache


def read(
    config: ModelConfig, weights: DecodeWeights, layers: tuple[LayerCache, ...], token_B: jax.Array, slot_B: jax.Array
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """One token a row, through all layers -> (caches that have it, its hidden state [B, D] after the final norm)."""
    tables, slot_B1 = rotary.tables(config, slot_B[:, None]), slot_B[:, None]
    x_B1D, written = embed(weights, token_B[:, None]), []
    for leaves, cache in zip(weights.layers, layers, strict=True):

        def mix(
            query_B1HK: jax.Array, key_B1GK: jax.Array, value_B1GK: jax.Array, cache: LayerCache = cache
        ) -> tuple[jax.Array, LayerCache]:
            cache = cache.write(key_B1GK, value_B1GK, slot_B1)
            return cache.attend(query_B1HK[:, 0], slot_B)[:, None], cache

        x_B1D, cache = block(config, weights, leaves, x_B1D, tables, mix)
        written.append(cache)
    return tuple(written), rms_norm(weights.final_norm, x_B1D[:, 0], config.norm_epsilon)


def _score(config: ModelConfig, weights: DecodeWeights, hidden_BPD: jax.Array, tokens_BP: jax.Array) -> jax.Array:
    """The log-probability [B, P] of each token after those before it; of the first, after the row's last one."""
    batch, prompt, width = hidden_BPD.shape
    before_BPD = jnp.roll(hidden_BPD, 1, axis=1)

    def score(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, tokens = chunk  # [places, B, D], [places, B]
        logits = head(config, weights, hidden.reshape(-1, width))
        return log_probabilities(logits, tokens.reshape(-1)).reshape(tokens.shape)

    chunks = (
        before_BPD.swapaxes(0, 1).reshape(-1, _SCORED, batch, width),
        tokens_BP.swapaxes(0, 1).reshape(-1, _SCORED, batch),
    )
    return jax.lax.map(score, chunks).reshape(prompt, batch).T
