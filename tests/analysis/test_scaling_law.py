"""The scaling law recovers what was planted, its optimum is one, and its units are what they are said to be."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from cpmjax.analysis import scaling_law
from cpmjax.analysis.scaling_law import ScalingLaw, tokens_per_parameter
from cpmjax.run.errors import UserError

HOFFMANN = ScalingLaw(406.4, 0.34, 410.7, 0.28, 1.69)
BESIROGLU = ScalingLaw(482.01, 0.3478, 2085.43, 0.3658, 1.8172)


def models(law, noise=0.0, seed=0):
    """Six sizes of 40M to 2B with six amounts of data each, as in MiniCPM's paper."""
    N_T, times_T = np.meshgrid(np.geomspace(4e7, 2e9, 6), np.arange(10, 70, 10))
    N_T, D_T = N_T.ravel(), (N_T * times_T).ravel()
    return N_T, D_T, law.loss(N_T, D_T) * np.exp(noise * np.random.default_rng(seed).normal(size=N_T.size))


@pytest.mark.parametrize(("law", "loss"), [(HOFFMANN, 1.9366), (BESIROGLU, 1.9739)])
def test_published_constants(law, loss):
    assert law.loss(70e9, 1.4e12) == pytest.approx(loss, abs=5e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU, ScalingLaw(50.0, 0.29, 30.0, 0.23, 0.5)])
def test_planted_constants_come_back(law):
    found = scaling_law.fit(*models(law))
    assert [found.a, found.b] == pytest.approx([law.a, law.b], abs=0.01)
    assert abs(found.L0 - law.L0) < 0.02
    assert found.optimum(4e21) == pytest.approx(law.optimum(4e21), rel=0.02)


def test_outliers_do_not_move_the_fit():
    """Two models that diverged; least squares would follow them."""
    N_T, D_T, losses_T = models(HOFFMANN)
    losses_T[[3, 20]] *= 1.3
    found = scaling_law.fit(N_T, D_T, losses_T)
    assert [found.a, found.b] == pytest.approx([HOFFMANN.a, HOFFMANN.b], abs=0.01)


def test_the_bootstrap_interval_holds_the_truth_and_grows_with_the_noise():
    widths = []
    for noise in (0.0005, 0.005):
        laws = scaling_law.bootstrap(*models(HOFFMANN, noise), resamples=30)
        low, high = np.percentile([law.a for law in laws], [2.5, 97.5])
        assert low - 0.01 < HOFFMANN.a < high + 0.01
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_what_is_left_out_has_no_part_in_the_fit():
    N_T, D_T, losses_T = models(HOFFMANN)
    out_T = N_T > 1e9
    (without,) = scaling_law.fits_without(N_T, D_T, np.where(out_T, 1.5 * losses_T, losses_T), out_T[None])
    assert [without.a, without.b] == pytest.approx([HOFFMANN.a, HOFFMANN.b], abs=0.01)
    assert without.loss(N_T[out_T], D_T[out_T]) == pytest.approx(losses_T[out_T], abs=0.005)


def test_models_that_err_together_are_drawn_together():
    """Each size is off as a whole: drawn one by one its models would look surer than they are."""
    N_T, D_T, losses_T = models(HOFFMANN)
    size_T = np.unique(N_T, return_inverse=True)[1]
    losses_T = losses_T * np.exp(0.005 * np.random.default_rng(0).normal(size=6)[size_T])
    widths = []
    for together_T in (size_T, None):
        laws = scaling_law.bootstrap(N_T, D_T, losses_T, resamples=30, together_T=together_T)
        low, high = np.percentile([law.L0 for law in laws], [2.5, 97.5])
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1]


def test_the_optimum_spends_the_budget_and_is_stationary():
    compute = 1e21
    N, D = HOFFMANN.optimum(compute)
    assert abs(6 * N * D / compute - 1) < 1e-12
    assert abs(D / N - tokens_per_parameter(HOFFMANN.K**2, HOFFMANN.eta, compute)) < 1e-9 * D / N
    with jax.enable_x64(True):
        slope = jax.grad(lambda log_N: HOFFMANN.loss(jax.numpy.exp(log_N), compute / 6 / jax.numpy.exp(log_N)))
        assert abs(float(slope(np.log(N)))) < 1e-8
        assert abs(float(slope(np.log(N) + 0.1))) > 1e-4  # elsewhere it is not


def test_tokens_per_parameter_do_not_depend_on_the_unit():
    compute, unit = 4e21, 1e9
    N, D = HOFFMANN.optimum(compute)
    in_billions = HOFFMANN.in_units(unit)
    assert np.multiply(in_billions.optimum(compute / unit**2), unit) == pytest.approx((N, D), rel=1e-9)
    assert in_billions.loss(N / unit, D / unit) == pytest.approx(HOFFMANN.loss(N, D), rel=1e-12)
    for law, counted in ((HOFFMANN, 1.0), (in_billions, unit)):
        assert tokens_per_parameter(law.K**2, law.eta, compute, counted) == pytest.approx(D / N, rel=1e-9)


def test_minicpm_constants_are_for_billions():
    assert tokens_per_parameter(0.01, -0.10, 4e21, unit=1e9) == pytest.approx(192, abs=0.5)
    assert tokens_per_parameter(0.01, -0.10, 1.6e22, unit=1e9) == pytest.approx(220, abs=0.5)
    assert tokens_per_parameter(0.01, -0.10, 4e21) > 5000  # read as plain numbers
    assert ScalingLaw(1, 0.29, 1, 0.23, 0).eta == pytest.approx(-0.115, abs=5e-4)  # not the -0.10 they print


def test_models_of_one_size_determine_no_law():
    with pytest.raises(UserError, match=r"8 losses of 1 sizes and 8 amounts of data; expected at least 5 of 2 sizes"):
        scaling_law.fit(np.full(8, 1e8), np.geomspace(1e9, 1e10, 8), np.linspace(4, 3, 8))
