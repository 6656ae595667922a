"""Intervals over rows."""

from __future__ import annotations

import numpy as np
import pytest

from cpmjax.analysis.rows import bootstrap


def test_an_interval_of_a_mean_is_that_of_its_standard_error():
    rows = np.random.default_rng(1).normal(3.0, 0.5, 400)
    found = bootstrap(lambda mean: mean, rows, samples=4000)
    error = 0.5 / np.sqrt(400)
    assert found.value == pytest.approx(rows.mean())
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.15)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.15)


def test_what_rows_have_in_common_cancels_in_a_difference():
    draw = np.random.default_rng(2)
    hard = draw.normal(3.0, 1.0, 200)
    one, other = hard + 0.01 * draw.normal(size=200), hard + 0.1
    found = bootstrap(lambda a, b: b - a, one, other)
    assert found.high - found.low < 0.01 and found.low < 0.1 < found.high


def test_arrays_of_values():
    losses = np.random.default_rng(3).normal(size=(2, 3, 50))
    found = bootstrap(lambda means: means.max(0), losses)
    np.testing.assert_allclose(found.value, losses.mean(-1).max(0))
    assert found.low.shape == (3,) and (found.low < found.high).all()
