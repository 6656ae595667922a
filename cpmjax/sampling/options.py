"""What a caller may ask of sampling, checked and turned into arrays: one program serves any mixture of options.

B rows, K biased tokens a row.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.run.errors import UserError

MOST_BIASED = 300  # tokens of a row, as OpenAI's interface has it


class Options(NamedTuple):
    """Sampling options, each with a value a row. `logits.py` says what they do and in which order."""

    temperature_B: jax.Array  # float32; 0 is greedy
    top_k_B: jax.Array  # int32; 0 is off
    top_p_B: jax.Array  # float32; 1 is off
    min_p_B: jax.Array  # float32; 0 is off
    typical_p_B: jax.Array  # float32; 1 is off
    repetition_B: jax.Array  # float32; 1 is off
    presence_B: jax.Array  # float32; 0 is off
    frequency_B: jax.Array  # float32; 0 is off
    seed_B: jax.Array  # uint32
    bias_ids_BK: jax.Array  # int32; -1 where a row has fewer than K
    bias_values_BK: jax.Array  # float32; 0 there


class _Rule(NamedTuple):
    """One option: what it is when nobody names it, its type, what it may be, and how to say so."""

    default: float
    dtype: type
    holds: Callable[[Any], bool]
    expected: str


# A number below the smallest normal float32 may count as 0 on a device, and a penalty divides by it.
_TINY = float(np.finfo(np.float32).tiny)
_SHARE = (lambda value: 0 < value <= 1, "a number above 0, at most 1")

# In the order of the fields of Options.
_RULES = {
    "temperature": _Rule(1, np.float32, lambda value: 0 <= value < math.inf, "a number from 0 (greedy) up"),
    "top_k": _Rule(0, np.int32, lambda value: 0 <= value < 2**31, "a whole number from 0 (off) to 2147483647"),
    "top_p": _Rule(1, np.float32, *_SHARE),
    "min_p": _Rule(0, np.float32, lambda value: 0 <= value < 1, "a number from 0 up, below 1"),
    "typical_p": _Rule(1, np.float32, *_SHARE),
    "repetition_penalty": _Rule(1, np.float32, lambda value: _TINY <= value < math.inf, "a number above 0"),
    "presence_penalty": _Rule(0, np.float32, math.isfinite, "a finite number"),
    "frequency_penalty": _Rule(0, np.float32, math.isfinite, "a finite number"),
    "seed": _Rule(0, np.uint32, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295"),
}
_BIAS = "logit_bias"


def make_options(rows: int, vocabulary: int, **named: Any) -> Options:
    """Named options -> arrays for `rows` rows. What is not named is off; the temperature is 1 and the seed 0.

    temperature, top_k, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty and seed are a
    number, or a sequence of one a row; logit_bias is {token id: what is added to its logit}, -inf to forbid it, or a
    sequence of such a mapping (or None) a row, of at most 300 tokens each. K is a power of two, so that few shapes
    compile. Raises UserError for an unknown name and for a value out of range, with the option, the row and the value.
    """
    for name in named:
        if name not in _RULES and name != _BIAS:
            known = [*_RULES, _BIAS]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" (nearest: {nearest[0]})" if nearest else ""
            raise UserError(f"unknown sampling option {name}: expected one of {', '.join(known)}{hint}")
    columns = [_column(name, rule, rows, named.get(name, rule.default)) for name, rule in _RULES.items()]
    return Options(*map(jnp.asarray, (*columns, *_biases(rows, vocabulary, named.get(_BIAS)))))


def _refuse(name: str, row: int | None, value: Any, expected: str) -> NoReturn:
    place = "" if row is None else f" of row {row}"
    raise UserError(f"{name}{place} = {reprlib.repr(value)}: expected {expected}")


def _by_row(name: str, rows: int, value: Any) -> list[tuple[int | None, Any]]:
    """(row, value) for each row; a value that serves them all belongs to row None."""
    if isinstance(value, np.ndarray | jax.Array):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [(None, value)] * rows
    if len(value) != rows:
        _refuse(name, None, value, f"one value, or one for each of {rows} rows, not {len(value)}")
    return list(enumerate(value))


def _column(name: str, rule: _Rule, rows: int, given: Any) -> np.ndarray:
    kind = numbers.Integral if issubclass(rule.dtype, np.integer) else numbers.Real
    values = []
    for row, value in _by_row(name, rows, given):
        if not isinstance(value, kind) or isinstance(value, bool) or not rule.holds(_rounded(value, rule.dtype)):
            _refuse(name, row, value, rule.expected)
        values.append(value)
    return np.asarray(values, rule.dtype)


def _rounded(value: Any, dtype: type) -> Any:
    """The value that the device will see: a top_p of 1e-60 would be 0 there, a temperature of 1e39 infinite."""
    if issubclass(dtype, np.integer):
        return value
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _biases(rows: int, vocabulary: int, given: Any) -> tuple[np.ndarray, np.ndarray]:
    """-> ids [B, K], values [B, K]."""
    biases: list[Mapping[int, float]] = []
    for row, bias in _by_row(_BIAS, rows, given):
        bias = {} if bias is None else bias
        if not isinstance(bias, Mapping):
            _refuse(_BIAS, row, bias, "a mapping of token ids to numbers")
        if len(bias) > MOST_BIASED:
            _refuse(_BIAS, row, bias, f"at most {MOST_BIASED} tokens, not {len(bias)}")
        for token, value in bias.items():
            if not isinstance(token, numbers.Integral) or not 0 <= int(token) < vocabulary:
                _refuse(_BIAS, row, token, f"a token id from 0 to {vocabulary - 1}")
            if not isinstance(value, numbers.Real) or not _rounded(value, np.float32) < math.inf:
                _refuse(f"{_BIAS} of token {token}", row, value, "a finite number, or -inf to forbid the token")
        biases.append(bias)
    width = 1 << (max([1, *map(len, biases)]) - 1).bit_length()
    ids, values = np.full((rows, width), -1, np.int32), np.zeros((rows, width), np.float32)
    for row, bias in enumerate(biases):
        ids[row, : len(bias)], values[row, : len(bias)] = list(bias.keys()), list(bias.values())
    return ids, values
