"""Logits to tokens: penalties, filters, and one draw a row. Pure functions of arrays, row by row.

The order of what is applied:

    1. repetition   logits of the prompt's and the generated tokens: divided where positive, multiplied where negative
    2. presence     subtracted once from the logits of generated tokens, and
       frequency    subtracted as often as the token was generated
    3. bias         added
    4. temperature  0 takes the largest logit, of equal ones the lowest id, and what follows is left out
    5. top-k        the k most probable tokens
    6. top-p        the fewest tokens, most probable first, that hold at least the share p
    7. min-p        the tokens at least min-p times as probable as the most probable one
    8. typical-p    the fewest tokens, the nearest of -log p to the entropy first, that hold at least the share p

Each filter sees the renormalised distribution that those before it left. Tokens in a tie for the last place all stay:
which of equal tokens comes first would otherwise depend on their ids.

A row's token depends on its logits, its options and its position, to the bit: probabilities are integers, whose sums
are the same in any order, in any batch and on any device mesh. Nothing is sorted: a filter's threshold is found by
bisection. One uniform number a row goes through the inverse of the cumulative distribution.

B rows, V vocabulary, folded into N stretches of C columns; K biased tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Callers find both here too, beside what they steer.
from cpmjax.sampling.options import Options as Options
from cpmjax.sampling.options import make_options as make_options

# A sum over few long stretches, for all columns at once, is what vector units are good at; they begin at cache lines.
_STRETCHES = 8
_ALIGNED = 16
_WHOLE = 2**30  # probability 1 as an integer; with the roundings of a vocabulary still far below 2^31
_INFINITE = 0x7F800000  # the bits of a float32 infinity


def adjust(logits_BV: jax.Array, options: Options, prompt_BV: jax.Array, counts_BV: jax.Array) -> jax.Array:
    """Penalties and bias -> float32 logits [B, V].

    `prompt_BV` (bool) marks the tokens of the prompt, `counts_BV` (int32) says how often each was generated so far.
    What no row asks for is not computed.
    """

    def penalise(logits_BV: jax.Array) -> jax.Array:
        repetition_B1, generated_BV = options.repetition_B[:, None], counts_BV > 0
        repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
        logits_BV = jnp.where(prompt_BV | generated_BV, repeated_BV, logits_BV)
        return logits_BV - options.presence_B[:, None] * generated_BV - options.frequency_B[:, None] * counts_BV

    def bias(logits_BV: jax.Array) -> jax.Array:
        # Padding, -1, is the last token, to which it adds 0.
        rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
        return logits_BV.at[rows_B1, options.bias_ids_BK].add(options.bias_values_BK)

    penalised_B = (options.repetition_B != 1) | (options.presence_B != 0) | (options.frequency_B != 0)
    logits_BV = _where_any(penalised_B, penalise, logits_BV.astype(jnp.float32))
    return _where_any(options.bias_ids_BK >= 0, bias, logits_BV)


def choose(logits_BV: jax.Array, options: Options, position_B: jax.Array) -> jax.Array:
    """Adjusted float32 logits -> a token a row, int32 [B].

    The uniform number of a row is a function of its seed and of `position_B` (int32: the place of the new token in its
    row). A logit of -inf is never chosen as long as the row has another; a row with a NaN gets token 0.
    """

    def row_by_row(*arguments: jax.Array | Options) -> jax.Array:
        # A row of a large vocabulary fits a processor's cache, a batch of them does not; bisection reads it often.
        return lax.map(lambda row: _choose(*jax.tree.map(lambda leaf: leaf[None], row))[0], arguments)

    return lax.platform_dependent(logits_BV, options, position_B, cpu=row_by_row, default=_choose)


def log_probabilities(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """log p of each row's token under softmax(logits) -> float32 [B]."""
    logits_BV = logits_BV.astype(jnp.float32)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def top_log_probabilities(logits_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` (at most V) most probable tokens -> log p (float32) and ids (int32), both [B, count], descending.

    Compiles once for each count.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    values_BT, ids_BT = lax.top_k(logits_BV, count)
    return values_BT - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True), ids_BT


def _where_any(used_B: jax.Array, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """change(x) if any row needs it; it must leave the rows that do not as they are."""
    return lax.cond(jnp.any(used_B), change, lambda x: x, x)


def _choose(logits_BV: jax.Array, options: Options, position_B: jax.Array) -> jax.Array:
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # The first of the largest, and 0 among NaN; argmax itself takes ten times as long on a CPU.
    ids_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    greedy_B = jnp.min(jnp.where(logits_BV < top_B1, logits_BV.shape[-1], ids_V), axis=-1)
    sampled_B = (options.temperature_B > 0) & ~jnp.isnan(top_B1[:, 0])

    def sample(greedy_B: jax.Array) -> jax.Array:
        weights_BNC = _weights(_distance(logits_BV, top_B1, options.temperature_B), options)
        return jnp.where(sampled_B, _draw(weights_BNC, options.seed_B, position_B), greedy_B)

    return _where_any(sampled_B, sample, greedy_B)


def _distance(logits_BV: jax.Array, top_B1: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """How far each tempered logit is below the largest -> [B, N, C], filled up with what has no probability."""
    rows, vocabulary = logits_BV.shape
    # A greedy row divides by 1, and equal infinities have no difference.
    temperature_B1 = jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    distance_BV = jnp.where(logits_BV == top_B1, 0.0, (top_B1 - logits_BV) / temperature_B1)
    missing = -vocabulary % (_STRETCHES * _ALIGNED)
    return jnp.pad(distance_BV, ((0, 0), (0, missing)), constant_values=jnp.inf).reshape(rows, _STRETCHES, -1)


def _weights(distance_BNC: jax.Array, options: Options) -> jax.Array:
    """Probabilities as integers, 0 where a filter took the token.

    They add up to about 2^30 before the filters: a token less probable than 2^-31 has none.
    """
    relative_BNC = jnp.exp(-distance_BNC)
    per_whole_B11 = (_WHOLE / _sum(relative_BNC))[:, None, None]
    weights_BNC = jnp.round(relative_BNC * per_whole_B11).astype(jnp.int32)

    def top_k(weights_BNC: jax.Array) -> jax.Array:
        target_B = jnp.where(options.top_k_B > 0, options.top_k_B, distance_BNC[0].size)
        return _nearest(distance_BNC, weights_BNC, (weights_BNC > 0).astype(jnp.int32), target_B)

    def top_p(weights_BNC: jax.Array) -> jax.Array:
        return _nearest(distance_BNC, weights_BNC, weights_BNC, _share(weights_BNC, options.top_p_B))

    def min_p(weights_BNC: jax.Array) -> jax.Array:
        return jnp.where(relative_BNC >= options.min_p_B[:, None, None], weights_BNC, 0)

    def typical_p(weights_BNC: jax.Array) -> jax.Array:
        # -log p is the distance plus a constant and the entropy its mean, so the constant does not matter.
        kept_BNC = weights_BNC > 0
        moment_B = _sum(jnp.where(kept_BNC, relative_BNC * distance_BNC, 0))
        mean_B = moment_B / _sum(jnp.where(kept_BNC, relative_BNC, 0))
        surprise_BNC = jnp.abs(distance_BNC - mean_B[:, None, None])
        return _nearest(surprise_BNC, weights_BNC, weights_BNC, _share(weights_BNC, options.typical_p_B))

    weights_BNC = _where_any(options.top_k_B > 0, top_k, weights_BNC)
    weights_BNC = _where_any(options.top_p_B < 1, top_p, weights_BNC)
    weights_BNC = _where_any(options.min_p_B > 0, min_p, weights_BNC)
    return _where_any(options.typical_p_B < 1, typical_p, weights_BNC)


def _total(x_BNC: jax.Array) -> jax.Array:
    """Sum of integers -> [B]."""
    # The barrier keeps the compiler from making one sum of the two, which takes three times as long.
    return jnp.sum(lax.optimization_barrier(jnp.sum(x_BNC, axis=1, dtype=x_BNC.dtype)), axis=-1, dtype=x_BNC.dtype)


def _sum(x_BNC: jax.Array) -> jax.Array:
    """Sum of numbers in [0, 1] -> float32 [B], the same in any order: fixed-point numbers of two halves."""
    bits = min(15, 32 - x_BNC[0].size.bit_length())  # of a half, so that its sum stays below 2^32
    fixed_BNC = (x_BNC * 2.0 ** (2 * bits)).astype(jnp.int32).astype(jnp.uint32)
    high_B, low_B = _total(fixed_BNC >> bits), _total(fixed_BNC & (2**bits - 1))
    return high_B.astype(jnp.float32) * 2.0**-bits + low_B.astype(jnp.float32) * 2.0 ** (-2 * bits)


def _nearest(distance_BNC: jax.Array, weights_BNC: jax.Array, counted_BNC: jax.Array, target_B: jax.Array) -> jax.Array:
    """The weights within the least distance that holds at least `target_B` of what is counted, 0 for the others.

    All of them where there is less than the target. Bisection over the bits of the distance, which as an integer have
    the order of the numbers that they are.
    """
    bits_BNC = lax.bitcast_convert_type(distance_BNC, jnp.int32)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        held_B = _total(jnp.where(bits_BNC <= middle_B[:, None, None], counted_BNC, 0))
        high_B = jnp.where(held_B >= target_B, middle_B, high_B)
        # To hold exactly the target is as good as the least distance.
        return jnp.where(held_B == target_B, high_B, jnp.where(held_B > target_B, low_B, middle_B + 1)), high_B

    start = jnp.zeros_like(target_B), jnp.full_like(target_B, _INFINITE)
    _, limit_B = lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, start)
    return jnp.where(bits_BNC <= limit_B[:, None, None], weights_BNC, 0)


def _share(weights_BNC: jax.Array, share_B: jax.Array) -> jax.Array:
    """A share of all weights, at least 1 of them -> int32 [B]; where the share is 1, more than there are."""
    total_B = _total(weights_BNC)
    fraction_B = (jnp.where(share_B < 1, share_B, 0) * 2.0**32).astype(jnp.uint32)
    return jnp.where(share_B < 1, jnp.maximum(_multiply(total_B, fraction_B), 1), total_B + 1)


def _multiply(total_B: jax.Array, fraction_B: jax.Array) -> jax.Array:
    """floor(total * fraction / 2^32) for int32 totals and uint32 fractions, exactly: the long multiplication."""
    total_B = total_B.astype(jnp.uint32)
    total_high, total_low = total_B >> 16, total_B & 0xFFFF
    high, low = fraction_B >> 16, fraction_B & 0xFFFF
    middle = total_high * low + (total_low * low >> 16)
    carry = total_low * high + (middle & 0xFFFF)
    return (total_high * high + (middle >> 16) + (carry >> 16)).astype(jnp.int32)


def _draw(weights_BNC: jax.Array, seed_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """A token a row, with probabilities as the weights -> int32 [B]."""

    def uniform(seed: jax.Array, position: jax.Array) -> jax.Array:
        # Named, since other generators give a row other numbers in another batch.
        key = jax.random.key(seed, impl="threefry2x32")
        return jax.random.bits(jax.random.fold_in(key, position), dtype=jnp.uint32)

    # Along the distribution the tokens lie column by column.
    columns_BC = jnp.sum(weights_BNC, axis=1)
    # Below the total, so that it always falls on a token, and on one whose weight is above 0.
    drawn_B = _multiply(jnp.sum(columns_BC, axis=-1), jax.vmap(uniform)(seed_B, position_B))
    column_B, drawn_B = _locate(columns_BC, drawn_B)
    weights_BN = jnp.take_along_axis(weights_BNC, column_B[:, None, None], axis=2)[:, :, 0]
    stretch_B, _ = _locate(weights_BN, drawn_B)
    return stretch_B * weights_BNC.shape[2] + column_B


def _locate(weights_BX: jax.Array, drawn_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index on which a number below the total falls, and how far into it."""
    ends_BX = jnp.cumsum(weights_BX, axis=-1)
    before_BX = ends_BX <= drawn_B[:, None]
    return jnp.sum(before_BX, axis=-1, dtype=jnp.int32), drawn_B - jnp.max(jnp.where(before_BX, ends_BX, 0), axis=-1)
