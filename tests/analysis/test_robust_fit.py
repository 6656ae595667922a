"""The fit under the laws: against least squares where that is the answer, and against outliers where it is not."""

from __future__ import annotations

import numpy as np
import pytest

from cpmjax.analysis.robust_fit import RobustFit

X_T = np.geomspace(1, 100, 60)


def power(parameters):
    return parameters["A"] * X_T ** -parameters["alpha"]


def problem(losses_T):
    return RobustFit(power, ["A", "alpha"], ["A"], losses_T)


GRID = [{"alpha": alpha} for alpha in (0.1, 0.5, 2.0)]


def test_small_errors_give_least_squares_and_its_standard_errors():
    """Of the logarithms, which a power law makes a line; as long as no error is beyond 1e-3."""
    losses_T = 5 * X_T**-0.4 * np.exp(np.random.default_rng(0).uniform(-6e-4, 6e-4, X_T.size))
    found = problem(losses_T).solve(GRID)
    design_T2 = np.stack([np.ones_like(X_T), -np.log(X_T)], axis=1)
    (log_A, alpha), (squares,), *_ = np.linalg.lstsq(design_T2, np.log(losses_T))
    assert [np.log(found["A"]), found["alpha"]] == pytest.approx([log_A, alpha], abs=1e-8)
    covariance = np.linalg.inv(design_T2.T @ design_T2) * squares / (X_T.size - 2)
    errors = problem(losses_T).relative_errors(found)
    expected = np.sqrt(np.diag(covariance)) / [1, alpha]
    assert [errors["A"], errors["alpha"]] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_tenth_of_wild_losses_moves_nothing():
    losses_T = 5 * X_T**-0.4
    losses_T[::10] *= 2
    assert problem(losses_T).solve(GRID) == pytest.approx({"A": 5, "alpha": 0.4}, rel=1e-3)


def test_a_weight_counts_an_observation_again():
    losses_T = 5 * X_T**-0.4 * np.exp(np.random.default_rng(1).normal(size=X_T.size) * 0.02)
    kept = np.arange(X_T.size) % 3 > 0
    weighted = problem(losses_T).solve(GRID, weights_T=kept)
    alone = RobustFit(lambda p: p["A"] * X_T[kept] ** -p["alpha"], ["A", "alpha"], ["A"], losses_T[kept]).solve(GRID)
    assert weighted == pytest.approx(alone, rel=1e-5)
    assert problem(losses_T).refine(alone, kept) == pytest.approx(alone, rel=1e-5)
    assert weighted != pytest.approx(problem(losses_T).solve(GRID), rel=1e-4)


def test_a_parameter_that_does_nothing_is_not_determined():
    fit = RobustFit(lambda p: power(p) + 0 * p["idle"], ["A", "alpha", "idle"], ["A"], 5 * X_T**-0.4)
    errors = fit.relative_errors({"A": 5, "alpha": 0.4, "idle": 1})
    assert errors["idle"] == np.inf and errors["A"] < 1e-9 > errors["alpha"]


def test_one_observation_determines_no_two_parameters():
    fit = RobustFit(lambda p: p["A"] * 2.0 ** -p["alpha"] * np.ones(1), ["A", "alpha"], ["A"], np.ones(1))
    assert fit.relative_errors({"A": 5, "alpha": 0.4}) == {"A": np.inf, "alpha": np.inf}
