"""Beam search: the most probable continuations of prompts, by the same pieces as `decode`, on a state of its own.

In each step every live hypothesis is continued by every token. Of all these continuations of a prompt the W best are
looked at, and those that a stop id ends are finished; the W best that none ends live on. So a hypothesis is finished
only where stopping is one of the best things to do, as in Hugging Face's and fairseq's searches, and W always live.
Live ones are ranked by the sum of their log-probabilities, having all the same length; finished ones by their score,

    sum of the log-probabilities of the tokens / number of tokens ** length_penalty

(Hugging Face's rule; Wu et al. 2016, arXiv 1609.08144, equation 14, has (5 + length) / 6 for length). A stop id counts
as a token in both. A prompt's W best finished ones are kept.

N prompts, W beams, B = N * W rows, of which beam w of prompt n is row n * W + w; P prompt length, T new tokens, J stop
ids, D width, V vocabulary; I entries of an index.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cpmjax.model.cache import LayerCache
from cpmjax.run.config import ModelConfig
from cpmjax.sampling.decode import DecodeState, head, read
from cpmjax.sampling.weights import DecodeWeights


class BeamRequest(NamedTuple):
    """What is asked of each prompt, and of all."""

    stop_ids_NJ: jax.Array  # int32, none of a prompt's twice: any of them ends a hypothesis; -1 is none
    limit_N: jax.Array  # int32: a hypothesis of so many tokens is finished as well; at most T
    length_penalty: jax.Array  # float32, one: above 0 favours the long


class Hypotheses(NamedTuple):
    """W of each prompt, best first."""

    score_NW: jax.Array  # float32: what they are ranked by; -inf where there is none
    length_NW: jax.Array  # int32: how many entries of the following are written
    tokens_NWT: jax.Array  # int32
    log_probabilities_NWT: jax.Array  # float32, of the tokens


class BeamState(NamedTuple):
    """Between two tokens."""

    layers: tuple[LayerCache, ...]  # of B rows and P + T slots
    hidden_BD: jax.Array  # of each live hypothesis' last token, after the final norm
    length_N: jax.Array  # int32: tokens of the prompt
    step: jax.Array  # int32, one: tokens of each live hypothesis
    ended_N: jax.Array  # bool: `finished` is the result; what becomes of the live ones does not matter any more
    live: Hypotheses
    finished: Hypotheses


@partial(jax.jit, static_argnames="beams")
def spread(state: DecodeState, *, beams: int) -> BeamState:
    """A state fresh from `prefill`, a row a prompt -> the start of a search, in which only one beam is a hypothesis.

    Compiles once for each number of beams with each N, P + T and T.
    """
    prompts, new_tokens = state.tokens_BT.shape

    def none() -> Hypotheses:
        return Hypotheses(
            score_NW=jnp.full((prompts, beams), -jnp.inf),
            length_NW=jnp.zeros((prompts, beams), jnp.int32),
            tokens_NWT=jnp.zeros((prompts, beams, new_tokens), jnp.int32),
            log_probabilities_NWT=jnp.zeros((prompts, beams, new_tokens)),
        )

    layers, hidden_BD = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (state.layers, state.hidden_BD))
    return BeamState(
        layers=layers,
        hidden_BD=hidden_BD,
        length_N=state.length_B,
        step=jnp.int32(0),
        ended_N=jnp.zeros(prompts, bool),
        live=none()._replace(score_NW=none().score_NW.at[:, 0].set(0)),
        finished=none(),
    )


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def search(config: ModelConfig, weights: DecodeWeights, state: BeamState, request: BeamRequest) -> BeamState:
    """Moves the state on until every prompt has ended: the results are its `finished`. Its memory is reused.

    A prompt of limit 0 has ended before it begins. Compiles once for each set of shapes: N, W, P + T, T and J.
    """
    beams = state.live.score_NW.shape[1]

    def advance(state: BeamState) -> BeamState:
        step = state.step + 1
        # At most 0 even as rounded, since the largest logit is subtracted first: `_hopeless` builds on it.
        log_BV = jax.nn.log_softmax(head(config, weights, state.hidden_BD))
        log_NWV = log_BV.reshape(-1, beams, log_BV.shape[1])
        going_on, best = _continuations(state.live.score_NW, log_NWV, request.stop_ids_NJ)

        found = _continue(state.live, log_NWV, best, state.step)
        complete_NW = best.stops_NW | (step >= request.limit_N)[:, None]
        score_NW = found.score_NW / _divisor(step, request)
        score_NW = jnp.where(complete_NW & ~state.ended_N[:, None], score_NW, -jnp.inf)
        both = jax.tree.map(
            lambda *x: jnp.concatenate(x, axis=1), state.finished, found._replace(score_NW=score_NW)
        )  # those kept so far first: an equal one does not displace them
        finished = _take(both, lax.top_k(both.score_NW, beams)[1])

        live = _continue(state.live, log_NWV, going_on, state.step)
        layers, hidden_BD = read(
            config,
            weights,
            jax.tree.map(lambda x: _of_parents(x, going_on.parent_NW), state.layers),
            going_on.token_NW.reshape(-1),
            jnp.repeat(state.length_N + state.step, beams),
        )
        over_N = (step >= request.limit_N) | _hopeless(live, finished, step, request)
        return BeamState(layers, hidden_BD, state.length_N, step, state.ended_N | over_N, live, finished)

    state = state._replace(ended_N=state.ended_N | (request.limit_N <= 0))
    return lax.while_loop(lambda state: ~jnp.all(state.ended_N), advance, state)


class _Continuations(NamedTuple):
    """W of each prompt, best first."""

    score_NW: jax.Array  # sum of log-probabilities
    parent_NW: jax.Array  # int32: which live hypothesis is continued
    token_NW: jax.Array  # int32: by what
    stops_NW: jax.Array  # bool: whether that is a stop id


def _continuations(
    score_NW: jax.Array, log_NWV: jax.Array, stop_ids_NJ: jax.Array
) -> tuple[_Continuations, _Continuations]:
    """The best continuations of live hypotheses -> (those without a stop id, all)."""
    prompts, beams, vocabulary = log_NWV.shape
    stop_ids = stop_ids_NJ.shape[1]
    sum_NWV = score_NW[..., None] + log_NWV

    # No hypothesis has more than W of the W best. None of its tokens need be sorted together with another's.
    stop_NV = jnp.any(jnp.arange(vocabulary) == stop_ids_NJ[..., None], axis=1)
    most = min(beams, vocabulary)
    best_NWC, ids_NWC = lax.top_k(jnp.where(stop_NV[:, None], -jnp.inf, sum_NWV), most)
    best_NW, place_NW = lax.top_k(best_NWC.reshape(prompts, -1), beams)
    token_NW = _take(ids_NWC.reshape(prompts, -1), place_NW)
    going_on = _Continuations(best_NW, place_NW // most, token_NW, jnp.zeros((prompts, beams), bool))

    # However many stop ids there are, the best of all are among those and these.
    ids_NWJ = jnp.broadcast_to(stop_ids_NJ[:, None], (prompts, beams, stop_ids))
    stopped_NWJ = jnp.where(ids_NWJ >= 0, jnp.take_along_axis(sum_NWV, ids_NWJ, axis=2), -jnp.inf)
    parent_NWJ = jnp.broadcast_to(jnp.arange(beams, dtype=jnp.int32)[:, None], ids_NWJ.shape)
    stopping = _Continuations(stopped_NWJ, parent_NWJ, ids_NWJ, jnp.ones(ids_NWJ.shape, bool))
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y.reshape(prompts, -1)], axis=1), going_on, stopping)
    return going_on, _take(both, lax.top_k(both.score_NW, beams)[1])


def _continue(live: Hypotheses, log_NWV: jax.Array, by: _Continuations, step: jax.Array) -> Hypotheses:
    """Live hypotheses of `step` tokens -> their continuations."""
    rows_N1 = jnp.arange(log_NWV.shape[0])[:, None]
    parents = _take(live, by.parent_NW)
    log_NW = log_NWV[rows_N1, by.parent_NW, by.token_NW]
    return Hypotheses(
        by.score_NW,
        parents.length_NW + 1,
        parents.tokens_NWT.at[:, :, step].set(by.token_NW),
        parents.log_probabilities_NWT.at[:, :, step].set(log_NW),
    )


def _hopeless(live: Hypotheses, finished: Hypotheses, step: jax.Array, request: BeamRequest) -> jax.Array:
    """Whether no continuation of a prompt's live hypotheses can displace a finished one -> bool [N].

    Log-probabilities are at most 0, so the sum s of a live one never rises. It will end with n tokens, step < n <=
    limit, and a score of at most s / n ** length_penalty. In n this rises if the penalty is above 0 and falls if it is
    below, so its largest value is at one of the two ends. What holds for the best live one holds for all.
    """
    score_N = live.score_NW[:, 0]
    ends = step + 1, jnp.maximum(step + 1, request.limit_N)
    bound_N = jnp.maximum(*(score_N / _divisor(length, request) for length in ends))
    return bound_N <= finished.score_NW[:, -1]


def _divisor(length: jax.Array, request: BeamRequest) -> jax.Array:
    return length.astype(jnp.float32) ** request.length_penalty


def _take(tree: Any, index_NI: jax.Array) -> Any:
    """Other entries of arrays [N, W, ...]: of each prompt those that the index names, [N, I, ...]."""
    # A gather within each prompt: a mesh that splits prompts moves no cache from part to part.
    return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, index_NI), tree)


def _of_parents(x: jax.Array, parent_NW: jax.Array) -> jax.Array:
    """Rows [B, ...] in the place of whom they continue."""
    return _take(x.reshape(*parent_NW.shape, *x.shape[1:]), parent_NW).reshape(x.shape)
