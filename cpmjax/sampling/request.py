"""What a caller asks of the sampler, checked and turned into one entry a row.

R rows of a call, J stop ids.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, TypeGuard

import jax
import numpy as np

from cpmjax.data.tokenizer import Tokenizer, is_unicode
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.sampling.options import Options, make_options

Prompt = str | Sequence[int]


class Asked(NamedTuple):
    """A call of the sampler. Arrays are numpy's."""

    prompts: list[list[int]]
    limit_R: np.ndarray  # int32: new tokens
    stop_ids_RJ: np.ndarray  # int32, each once, -1 where a row has fewer; J a power of two, so that few shapes compile
    options: Options


def longest(config: ModelConfig) -> int:
    """Tokens that a row may have: the context, and as much more as dynamic rotary scaling stretches it."""
    return int(config.context * config.rope_factor) if config.rope_scaling == "dynamic" else config.context


def check(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int | Sequence[int],
    stop_ids: Sequence[int] | Sequence[Sequence[int]] | None,
    options: dict[str, Any],
) -> Asked:
    """Raises UserError for what cannot be done, naming the value and its row."""
    texts: Any = [prompts] if isinstance(prompts, str) else prompts
    if not _is_list(texts):
        raise UserError(f"prompts = {reprlib.repr(texts)}; expected a text, or a list of texts or lists of token ids")
    rows = [_ids(config, tokenizer, row, prompt) for row, prompt in enumerate(texts)]
    limits: list[Any] = list(max_new_tokens) if _is_list(max_new_tokens) else [max_new_tokens] * len(rows)
    if len(limits) != len(rows):
        raise UserError(f"max_new_tokens: {len(limits)} values; expected one, or one for each of {len(rows)} prompts")
    for row, (ids, limit) in enumerate(zip(rows, limits, strict=True)):
        room = longest(config) - len(ids)
        if not _is_whole(limit) or not 1 <= limit <= room:
            expected = f"1 to {room}, since the prompt has {len(ids)} tokens and the context {longest(config)}"
            _refuse("max_new_tokens", row, limit, expected)
    return Asked(
        rows,
        np.asarray(limits, np.int32),
        _stop_ids(config, tokenizer, len(rows), stop_ids),
        Options(*map(np.asarray, make_options(len(rows), config.vocabulary, **options))),  # type: ignore[arg-type]
    )


def check_beams(asked: Asked, beams: Any, length_penalty: Any) -> None:
    """Raises UserError for what cannot be asked of beam search beside the rest."""
    if not _is_whole(beams) or beams < 1:
        raise UserError(f"beams = {reprlib.repr(beams)}; expected a positive whole number")
    if not isinstance(length_penalty, numbers.Real) or isinstance(length_penalty, bool):
        raise UserError(f"length_penalty = {reprlib.repr(length_penalty)}; expected a number")
    # As the device will see it: a score is a sum divided by this, and must not lose its order.
    most, float32 = int(max(asked.limit_R, default=1)), np.finfo(np.float32)
    with np.errstate(over="ignore"):
        divisor = np.float64(most) ** np.float64(length_penalty)
    if not math.isfinite(length_penalty) or not float32.tiny <= divisor <= float32.max:
        expected = f"a number, {most} to the power of which a float32 can hold"
        raise UserError(f"length_penalty = {length_penalty}; expected {expected}")


def _ids(config: ModelConfig, tokenizer: Tokenizer | None, row: int, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            _refuse("prompt", row, prompt, "token ids, since the sampler has no tokenizer")
        if not is_unicode(prompt):
            _refuse("prompt", row, prompt, "text, all of it Unicode")
        ids = [tokenizer.bos, *tokenizer.encode(prompt)] if prompt else []
    elif _is_list(prompt):
        ids = [_token(config, "prompt", row, token) for token in prompt]
    else:
        _refuse("prompt", row, prompt, "text or a list of token ids")
    if not ids:
        _refuse("prompt", row, prompt, "at least one character or token")
    if len(ids) >= longest(config):
        expected = f"fewer tokens than the {longest(config)} of the context, not {len(ids)}"
        _refuse("prompt", row, prompt, expected)
    return ids


def _stop_ids(config: ModelConfig, tokenizer: Tokenizer | None, rows: int, given: Any) -> np.ndarray:
    if given is None:
        given = [] if tokenizer is None else [tokenizer.eos]
    if not _is_list(given):
        raise UserError(f"stop_ids = {reprlib.repr(given)}; expected a list of token ids, or one such list a prompt")
    by_row = list(given) if len(given) and all(map(_is_list, given)) else [given] * rows
    if len(by_row) != rows:
        raise UserError(f"stop_ids: {len(by_row)} lists; expected one, or one for each of {rows} prompts")
    # Each once: given twice, a stop id would finish a hypothesis of beam search twice.
    checked = [
        list(dict.fromkeys(_token(config, "stop_ids", row, token) for token in ids)) for row, ids in enumerate(by_row)
    ]
    stop_ids_RJ = np.full((rows, bucket(max(map(len, checked), default=1))), -1, np.int32)
    for entries, ids in zip(stop_ids_RJ, checked, strict=True):
        entries[: len(ids)] = ids
    return stop_ids_RJ


def bucket(size: int, smallest: int = 1) -> int:
    """The power of two, from `smallest` (one itself) up, that holds `size`."""
    return max(smallest, 1 << (size - 1).bit_length()) if size > 1 else smallest


def _token(config: ModelConfig, name: str, row: int, token: Any) -> int:
    if not _is_whole(token) or not 0 <= token < config.vocabulary:
        _refuse(f"token of {name}", row, token, f"an id from 0 to {config.vocabulary - 1}")
    return int(token)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(value, str)


def _refuse(name: str, row: int, value: Any, expected: str) -> NoReturn:
    raise UserError(f"{name} of row {row} = {reprlib.repr(value)}: expected {expected}")
