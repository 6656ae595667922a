"""Options: what a caller may write, and what is refused in which words."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.run.errors import UserError
from cpmjax.sampling.options import make_options


def test_values_serve_all_rows_or_one_each():
    options = make_options(3, 10, temperature=0.5, top_k=[0, 5, 9], seed=np.asarray([1, 2, 2**32 - 1], np.uint32))
    np.testing.assert_array_equal(options.temperature_B, np.float32([0.5, 0.5, 0.5]))
    np.testing.assert_array_equal(options.top_k_B, [0, 5, 9])
    np.testing.assert_array_equal(options.seed_B, np.uint32([1, 2, 2**32 - 1]))
    names = ("top_p", "min_p", "typical_p", "repetition", "presence", "frequency")
    assert [float(getattr(options, f"{name}_B")[2]) for name in names] == [1, 0, 1, 1, 0, 0]
    assert [leaf.dtype.name for leaf in options] == [
        *("float32", "int32"),
        *["float32"] * 6,
        *("uint32", "int32", "float32"),
    ]


@pytest.mark.parametrize("longest, width", [(0, 1), (1, 1), (2, 2), (3, 4), (300, 512)])
def test_biases_are_as_wide_as_a_power_of_two(longest, width):
    bias = {token: token / 2 for token in range(longest)}
    options = make_options(2, 1000, logit_bias=[None, bias])
    assert options.bias_ids_BK.shape == options.bias_values_BK.shape == (2, width)
    assert (options.bias_ids_BK[0] == -1).all()
    ids, values = options.bias_ids_BK[1], options.bias_values_BK[1]
    assert dict(zip(ids[:longest].tolist(), values[:longest].tolist(), strict=True)) == bias
    assert (ids[longest:] == -1).all()


def test_a_bias_for_all_rows_may_forbid():
    options = make_options(2, 10, logit_bias={9: -math.inf})
    assert options.bias_ids_BK.tolist() == [[9], [9]] and options.bias_values_BK.tolist() == [[-math.inf]] * 2


@pytest.mark.parametrize(
    "named, message",
    [
        ({"temperature": math.nan}, "temperature = nan: expected a number from 0"),
        ({"temperature": [1, -0.5]}, "temperature of row 1 = -0.5: expected"),
        ({"temperature": 1e39}, "temperature = 1e+39"),
        ({"temperature": "hot"}, "temperature = 'hot'"),
        ({"temperature": True}, "temperature = True"),
        ({"temperature": None}, "temperature = None"),
        ({"temperature": [1, 2, 3]}, "one value, or one for each of 2 rows, not 3"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_k": 2.5}, "top_k = 2.5: expected a whole number"),
        ({"top_k": 2**31}, "top_k = 2147483648"),
        ({"top_p": 0}, "top_p = 0: expected a number above 0, at most 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": 1e-60}, "top_p = 1e-60"),
        ({"top_p": jnp.asarray([0.5, math.nan])}, "top_p of row 1 = nan"),
        ({"min_p": 1}, "min_p = 1: expected a number from 0 up, below 1"),
        ({"min_p": -0.1}, "min_p = -0.1"),
        ({"typical_p": 0}, "typical_p = 0"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0: expected a number above 0"),
        ({"repetition_penalty": [1, -1]}, "repetition_penalty of row 1 = -1"),
        ({"presence_penalty": math.inf}, "presence_penalty = inf"),
        ({"frequency_penalty": math.nan}, "frequency_penalty = nan"),
        ({"seed": -1}, "seed = -1: expected a whole number from 0 to 4294967295"),
        ({"seed": [0, 2**32]}, "seed of row 1 = 4294967296"),
        ({"logit_bias": {10: 1.0}}, "logit_bias = 10: expected a token id from 0 to 9"),
        ({"logit_bias": [{}, {-1: 1.0}]}, "logit_bias of row 1 = -1"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias = '3'"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 = nan"),
        ({"logit_bias": {3: 1e39}}, "logit_bias of token 3 = 1e+39"),
        ({"logit_bias": [None, {3: math.inf}]}, "logit_bias of token 3 of row 1 = inf"),
        ({"logit_bias": {token: 0.0 for token in range(301)}}, "at most 300 tokens, not 301"),
        ({"logit_bias": 3}, "logit_bias = 3: expected a mapping"),
        ({"temprature": 1}, "unknown sampling option temprature: .*nearest: temperature"),
        ({"repetition": 1.1}, "nearest: repetition_penalty"),
    ],
)
def test_what_is_refused(named, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")) as refused:
        make_options(2, 10, **named)
    assert "\n" not in str(refused.value)
