"""Prompts of any lengths in, samples out, as text and as token ids: buckets, splitting, and what surrounds decode."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model import cache as caches
from cpmjax.model.attention import CHUNK
from cpmjax.model.linear import FEW
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.distributed import fetch
from cpmjax.parallel.sharding import RULES
from cpmjax.run.errors import UserError
from cpmjax.sampling.beam import BeamRequest, search, spread
from cpmjax.sampling.decode import DecodeState, Request, decode, prefill, take
from cpmjax.sampling.request import Asked, Prompt, bucket, check, check_beams
from cpmjax.sampling.streaming import TextStream
from cpmjax.sampling.weights import DecodeWeights, decode_weights, widened

CacheDtype = Literal["compute", "float32", "int8"]

_CHUNK = 8  # tokens between two looks at the text, where it decides how a row goes on or is wanted as it comes
_SHORTEST = 16  # bucket of prompts and of new tokens
MOST_ROWS = 256  # of a batch
_SHARE = 0.25  # of a device's memory that the rows of a batch may take, beside the weights


@dataclass(frozen=True)
class Sample:
    """A continuation. Log-probabilities are natural, of the model itself, before any option."""

    prompt: list[int]
    tokens: list[int]  # with the stop id that ended it, if one did
    text: str  # without stop id and stop string; empty without a tokenizer
    logprobs: list[float]  # of each token
    top_logprobs: list[dict[int, float]] | None  # at each token the most probable ones, best first, if asked for
    prompt_logprobs: list[float] | None  # of each token of the prompt but the first, if asked for
    finish_reason: Literal["stop", "length"]
    score: float | None = None  # of beam search: sum(logprobs) / len(tokens) ** length_penalty


class Sampler:
    """A model made ready to generate: `sampler(prompts)` draws samples, `sampler.stream(prompt)` is the text of one as
    it comes, `sampler.beam_search(prompts)` looks for the most probable continuations.

    `tokenizer` None: token ids in and out only. `cache_dtype` is that of keys and values: as the model computes,
    float32, or int8 with scales. `max_batch` is how many rows run at a time; None takes a quarter of the memory of the
    device for them, and at most 256.

    The weights are copied into the layout of decode at the start, so that later changes of the model do not show. On a
    CPU those of 16 bits stay so for up to four rows at a time; the first larger batch makes a copy in float32. With
    `jax.set_mesh` active, here and at each call, weights and cache are split over the mesh, rows over its data axes.

    What compiles, once for all samplers of one model configuration: a prefill for each bucket of rows (powers of two up
    to max_batch) with each bucket of prompt length and of new tokens (powers of two from 16), of `logprobs`, with and
    without `prompt_logprobs`; for `n` > 1, the spreading of its rows over their samples; and a decode loop for each
    bucket of rows, prompt length, new tokens, stop ids and biased tokens, and of `logprobs`. For beam search such a
    prefill, without `logprobs`; and for each number of beams the spreading of prompts over them, and a loop for each
    bucket of prompts, prompt length, new tokens and stop ids. Options, seeds, limits, length penalties, stop ids, the
    lengths within a bucket and the weights are arrays, and compile nothing.
    """

    def __init__(
        self,
        model: MiniCPM,
        tokenizer: Tokenizer | None = None,
        *,
        cache_dtype: CacheDtype = "compute",
        max_batch: int | None = None,
    ):
        if cache_dtype not in get_args(CacheDtype):
            raise UserError(f"cache_dtype = {cache_dtype!r}; expected {', '.join(get_args(CacheDtype))}")
        if max_batch is not None and max_batch < 1:
            raise UserError(f"max_batch = {max_batch}; expected a positive whole number, or None")
        self.config = model.config
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        self._weights = decode_weights(model)
        self._cache_dtype = self._weights.final_norm.dtype.name if cache_dtype == "compute" else cache_dtype

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | Sequence[int] = 64,
        n: int = 1,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        logprobs: int = 0,
        prompt_logprobs: bool = False,
        **options: Any,
    ) -> list[Sample]:
        """Continues prompts, texts or lists of token ids -> `n` samples of each, prompt by prompt.

        A text gets the token that begins one in front. `max_new_tokens`, `stop_ids` and each option of
        `cpmjax.sampling.options.make_options` are one value, or one a prompt; sample i of a prompt has its seed + i.
        A row ends with the first of its stop ids (None: the end of text; () never), before the first of the strings
        `stop` in its text, or after max_new_tokens. `logprobs` asks for so many most probable tokens at each place.

        What a row becomes depends on its prompt, its options and its seed alone, up to the last bits of the logits.
        Raises UserError, naming the value and its row, for what cannot be done.
        """
        asked = check(self.config, self.tokenizer, prompts, max_new_tokens, stop_ids, options)
        if n < 1:
            raise UserError(f"n = {n}; expected a positive whole number")
        if not 0 <= logprobs <= self.config.vocabulary:
            raise UserError(
                f"logprobs = {logprobs}; expected 0 to {self.config.vocabulary}, the size of the vocabulary"
            )
        if stop and self.tokenizer is None:
            raise UserError(f"stop = {stop!r}: the sampler has no tokenizer; expected stop_ids instead")
        rows = [(row, sample) for row in range(len(asked.prompts)) for sample in range(n)]
        largest = self.max_batch or self._rows_that_fit(asked)
        samples: list[Sample] = []
        for start in range(0, len(rows), largest):
            samples += self._batch(asked, rows[start : start + largest], tuple(stop), logprobs, prompt_logprobs)
        return samples

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beams: int = 4,
        max_new_tokens: int | Sequence[int] = 64,
        length_penalty: float = 1.0,
        stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[list[Sample]]:
        """The most probable continuations that beam search finds -> for each prompt at most `beams`, best first.

        They are ranked by `score`: the sum of their log-probabilities, divided by the number of their tokens to the
        power of `length_penalty`, a stop id counted in both. 0 ranks by probability alone, 1 by the mean of a token;
        what is higher favours the long. Each ends with a stop id or after max_new_tokens, and the search as soon as
        none that goes on could still be among the best. `cpmjax.sampling.beam` says how it goes.

        Prompts, `max_new_tokens` and `stop_ids` as in a call. The beams of a prompt run together, each as one row. What
        is found depends on the prompt alone, up to the last bits of the logits. Raises UserError, naming the value,
        for what cannot be done.
        """
        asked = check(self.config, self.tokenizer, prompts, max_new_tokens, stop_ids, {})
        check_beams(asked, beams, length_penalty)
        largest = self.max_batch or self._rows_that_fit(asked, copies=2)
        if asked.prompts and beams > largest:
            raise UserError(f"beams = {beams}; expected at most {largest}, the rows that run at a time (max_batch)")
        together = 1 << (max(1, largest // beams).bit_length() - 1)
        found: list[list[Sample]] = []
        for start in range(0, len(asked.prompts), together):
            rows = list(range(start, min(start + together, len(asked.prompts))))
            found += self._search(asked, rows, int(beams), float(length_penalty))
        return found

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """The text of one sample, in pieces that together are `Sample.text`. Closing the iterator cancels the rest.

        Arguments and errors as in a call; it needs a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("stream: the sampler has no tokenizer; expected one, since text is streamed")
        asked = check(self.config, self.tokenizer, [prompt], max_new_tokens, stop_ids, options)
        return self._stream(asked, _Row(asked, 0, self.tokenizer, tuple(stop)))

    def _stream(self, asked: Asked, row: _Row) -> Iterator[str]:
        state, request, _ = self._begin(asked, [(0, 0)], top=0, score=False)
        while row.finish_reason is None:
            state = self._decode(state, request, _CHUNK)
            tokens, count, ended = fetch(state.tokens_BT), fetch(state.generated_B)[0], fetch(state.ended_B)[0]
            if text := row.push(tokens[0, :count].tolist(), ended):
                yield text

    def _batch(
        self, asked: Asked, rows: list[tuple[int, int]], stop: tuple[str, ...], top: int, score: bool
    ) -> list[Sample]:
        """The samples of some rows, each the number of a prompt and of one of its samples, at a time."""
        state, request, scores = self._begin(asked, rows, top, score)
        results = [_Row(asked, row, self.tokenizer, stop) for row, _ in rows]
        ended_B = np.zeros(len(request.limit_B), bool)
        while not ended_B.all():
            steps = _CHUNK if stop else state.tokens_BT.shape[1]
            state = self._decode(state, request, steps)
            tokens_BT, count_B, ended_B = (
                np.array(fetch(x)) for x in (state.tokens_BT, state.generated_B, state.ended_B)
            )
            for index, result in enumerate(results):
                result.push(tokens_BT[index, : count_B[index]].tolist(), ended_B[index])
                ended_B[index] |= result.finish_reason is not None
            if stop:
                state = state._replace(ended_B=jax.device_put(ended_B, state.ended_B.sharding))
        logprobs_BT, values_BTC, ids_BTC = map(
            fetch, (state.log_probabilities_BT, state.top_values_BTC, state.top_ids_BTC)
        )
        samples = []
        for index, (result, (row, _)) in enumerate(zip(results, rows, strict=True)):
            prompt, places = asked.prompts[row], range(len(result.tokens))
            samples.append(
                Sample(
                    prompt=prompt,
                    tokens=result.tokens,
                    text=result.text,
                    logprobs=logprobs_BT[index, : len(result.tokens)].tolist(),
                    top_logprobs=[
                        dict(zip(ids_BTC[index, place].tolist(), values_BTC[index, place].tolist(), strict=True))
                        for place in places
                    ]
                    if top
                    else None,
                    prompt_logprobs=None if scores is None else scores[row][1 : len(prompt)].tolist(),
                    finish_reason=result.finish_reason or "length",
                )
            )
        return samples

    @cached_property
    def _widened(self) -> DecodeWeights:
        return widened(self._weights)

    def _weights_for(self, rows: int) -> DecodeWeights:
        return self._weights if rows <= FEW else self._widened

    def _decode(self, state: DecodeState, request: Request, steps: int) -> DecodeState:
        return decode(self.config, self._weights_for(len(state.length_B)), state, request, np.int32(steps))

    def _search(self, asked: Asked, rows: list[int], beams: int, length_penalty: float) -> list[list[Sample]]:
        """What beam search finds for some prompts at a time."""
        prefilled, _ = self._read(asked, rows, int(asked.limit_R[rows].max()))
        # Rows of padding ask what the first one asks, but for no token at all.
        asking = rows + [rows[0]] * (len(prefilled.length_B) - len(rows))
        limit_N = np.where(np.arange(len(asking)) < len(rows), asked.limit_R[asking], 0).astype(np.int32)
        request = BeamRequest(
            jnp.asarray(asked.stop_ids_RJ[asking]), jnp.asarray(limit_N), jnp.asarray(length_penalty, jnp.float32)
        )
        state = search(self.config, self._weights_for(len(asking) * beams), spread(prefilled, beams=beams), request)
        score_NW, length_NW, tokens_NWT, logprobs_NWT = map(fetch, state.finished)

        def sample(index: int, beam: int) -> Sample:
            count, result = length_NW[index, beam], _Row(asked, rows[index], self.tokenizer, ())
            result.push(tokens_NWT[index, beam, :count].tolist(), ended=True)
            return Sample(
                prompt=asked.prompts[rows[index]],
                tokens=result.tokens,
                text=result.text,
                logprobs=logprobs_NWT[index, beam, :count].tolist(),
                top_logprobs=None,
                prompt_logprobs=None,
                finish_reason=result.finish_reason or "length",
                score=float(score_NW[index, beam]),
            )

        # -inf: the vocabulary, or the limit, allows fewer hypotheses.
        return [
            [sample(index, beam) for beam in range(beams) if score_NW[index, beam] != -np.inf]
            for index in range(len(rows))
        ]

    def _read(
        self, asked: Asked, rows: list[int], new_tokens: int, top: int = 0, score: bool = False
    ) -> tuple[DecodeState, jax.Array | None]:
        """Reads some prompts -> (a state of a bucket of rows, the first of them theirs; scores of the prompts)."""
        length = bucket(max(len(asked.prompts[row]) for row in rows), _SHORTEST)
        tokens_BP = np.zeros((_row_bucket(len(rows)), length), np.int32)
        length_B = np.ones(len(tokens_BP), np.int32)
        for index, row in enumerate(rows):
            ids = asked.prompts[row]
            tokens_BP[index, : len(ids)], length_B[index] = ids, len(ids)
        return prefill(
            self.config,
            self._weights,
            tokens_BP,
            length_B,
            new_tokens=bucket(new_tokens, _SHORTEST),
            cache_dtype=self._cache_dtype,
            top=top,
            score=score,
        )

    def _begin(
        self, asked: Asked, rows: list[tuple[int, int]], top: int, score: bool
    ) -> tuple[DecodeState, Request, dict[int, np.ndarray] | None]:
        """Reads the prompts of some rows -> (a state for them, what they ask, log-probabilities of each prompt)."""
        chosen = sorted({row for row, _ in rows})
        state, scores_BP = self._read(asked, chosen, int(asked.limit_R[chosen].max()), top, score)
        padding = _row_bucket(len(rows)) - len(rows)
        if len(rows) != len(chosen):
            source = [chosen.index(row) for row, _ in rows] + [0] * padding
            state = take(state, np.asarray(source, np.int32))
        # Rows of padding ask what the first one asks, but for no token at all.
        asking = [row for row, _ in rows] + [rows[0][0]] * padding
        options = jax.tree.map(lambda x: x[asking], asked.options)
        sample_B = np.asarray([sample for _, sample in rows] + [0] * padding, np.uint32)
        limit_B = np.where(np.arange(len(asking)) < len(rows), asked.limit_R[asking], 0).astype(np.int32)
        options = options._replace(seed_B=options.seed_B + sample_B)
        request = Request(options, jnp.asarray(asked.stop_ids_RJ[asking]), jnp.asarray(limit_B))
        scores = None if scores_BP is None else dict(zip(chosen, fetch(scores_BP), strict=False))
        return state, request, scores

    def _rows_that_fit(self, asked: Asked, copies: int = 1) -> int:
        """How many rows the memory set aside for them holds: caches, logits and counts, and what the prefill takes.

        `copies` is how often a cache exists at a time: twice where its rows take other places.
        """
        if not asked.prompts:
            return 1
        config = self.config
        prompt, new = bucket(max(map(len, asked.prompts)), _SHORTEST), bucket(int(asked.limit_R.max()), _SHORTEST)
        cache = caches.row_bytes(config, prompt + new, jnp.dtype(self._cache_dtype))
        scores = 8 * config.heads * min(prompt, CHUNK) * prompt  # of one chunk, before and after the softmax
        activations = self._weights.final_norm.dtype.itemsize * prompt * (3 * config.feed_forward + 12 * config.width)
        row = copies * cache + 32 * config.vocabulary + scores + activations
        device = self._weights.final_norm.addressable_shards[0].device
        memory = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
        memory = memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fit = max(1, int(_SHARE * memory / row))
        return min(MOST_ROWS, 1 << (fit.bit_length() - 1))


class _Row:
    """The tokens of one row as they come, their text, and how they ended."""

    def __init__(self, asked: Asked, row: int, tokenizer: Tokenizer | None, stop: tuple[str, ...]):
        self.tokens: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._stop_ids = set(asked.stop_ids_RJ[row].tolist())
        self._stream = None if tokenizer is None else TextStream(tokenizer, asked.prompts[row], stop)

    @property
    def text(self) -> str:
        return "" if self._stream is None else self._stream.text

    def push(self, tokens: list[int], ended: bool) -> str:
        """Takes all tokens so far, and whether there will be no more; returns the text that is certain now."""
        if self.finish_reason is not None:
            return ""
        pieces = []
        for token in tokens[len(self.tokens) :]:
            self.tokens.append(token)
            if token in self._stop_ids:
                self.finish_reason = "stop"
            elif self._stream is not None:
                pieces.append(self._stream.push([token]))
                if self._stream.stopped:
                    self.finish_reason = "stop"
            if self.finish_reason is not None:
                break
        if self._stream is not None and (ended or self.finish_reason):
            pieces.append(self._stream.finish())
            if self._stream.stopped:
                self.finish_reason = "stop"
        if ended and self.finish_reason is None:
            self.finish_reason = "length"
        return "".join(pieces)


def _row_bucket(rows: int) -> int:
    """A power of two; on a mesh, as many for each part into which it splits rows."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["rows"])
    return parts * bucket(-(-rows // parts))
