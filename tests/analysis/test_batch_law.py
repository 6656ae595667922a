"""The best batch of losses whose law was planted."""

from __future__ import annotations

import numpy as np
import pytest

from cpmjax.analysis.batch_law import (
    PAPER,
    BatchLaw,
    falling,
    fit,
    levels,
    minima,
    minimum,
    over_seeds,
    tokens_to,
)

BATCHES = 128.0 * 2 ** np.arange(6)
TOKENS = np.geomspace(16_384, 786_432, 25)


def planted(law: BatchLaw, flat: float = 1.0, noise: float = 0.0):
    """Curves of tokens = E(L) (flat + batch / best + best / batch): below the best batch noise costs tokens, above it
    steps are wasted; `flat` makes the bowls less deep, as in Kaplan's 1 + batch / critical batch."""
    losses, rng = np.geomspace(7, 2.5, 4000), np.random.default_rng(0)
    curves = []
    for batch in BATCHES:
        best = law.batch(losses)
        needed = 3e11 / losses**11 * (flat + batch / best + best / batch)
        curve = np.interp(np.log(TOKENS), np.log(needed), losses)
        curves.append((TOKENS, curve + noise * rng.normal(size=len(TOKENS))))
    return curves


@pytest.mark.parametrize("law", [BatchLaw(1.2e6, 5.0), BatchLaw(6.7e6, 6.24), BatchLaw(4e4, 3.0)])
@pytest.mark.parametrize("flat", [0.0, 1.0])
def test_a_planted_law_is_recovered(law, flat):
    found = minima(BATCHES, planted(law, flat))
    inside = [each for each in found if each]
    assert len(inside) >= 0.75 * len(found) > 10
    assert [each.batch for each in inside] == pytest.approx([law.batch(each.loss) for each in inside], rel=0.03)
    losses = [each.loss for each in inside]
    fitted = fit(losses, [each.batch for each in inside])
    assert fitted.p == pytest.approx(law.p, rel=0.03)
    assert fitted.batch(np.median(losses)) == pytest.approx(law.batch(np.median(losses)), rel=0.03)


def test_it_is_recovered_through_the_wobble_of_a_held_out_loss():
    law = BatchLaw(1.2e6, 5.0)
    inside = [each for each in minima(BATCHES, planted(law, noise=0.01)) if each]
    assert fit([m.loss for m in inside], [m.batch for m in inside]).p == pytest.approx(5, abs=0.5)


def test_the_tokens_and_the_depth_of_a_bowl_are_those_of_its_lowest_point():
    log_batches, best = np.log(BATCHES), np.log(700.0)
    found = minimum(4.0, BATCHES, np.exp(11 + 0.3 / 2 * (log_batches - best) ** 2))
    assert (found.loss, found.batch, found.tokens, found.curvature) == pytest.approx((4, 700, np.exp(11), 0.3))


def test_a_best_batch_at_the_edge_is_no_minimum():
    for law in (BatchLaw(1e4, 5.0), BatchLaw(1e9, 5.0)):  # far below and far above all batches
        found = minima(BATCHES, planted(law))
        assert len(found) > 10 and found == [None] * len(found)


def test_a_bowl_needs_a_neighbour_on_either_side():
    tokens = np.array([np.nan, 9.0, 8.0, 9.0, 12.0, np.nan])
    assert minimum(4.0, BATCHES, tokens) is not None
    assert minimum(4.0, BATCHES, np.where(tokens == 9.0, np.nan, tokens)) is None
    assert minimum(4.0, BATCHES, np.full(6, np.nan)) is None


def test_a_curve_never_rises_and_ends_where_it_diverged():
    assert falling(np.array([5.0, 4.0, 4.2, 3.0])) == pytest.approx([5, 4.1, 4.1, 3])
    assert falling(np.array([5.0, 4.0, np.inf, 3.0])).tolist() == [5, 4, np.inf, np.inf]


def test_tokens_to_a_level_lie_between_two_points_in_logarithms():
    tokens, losses = np.array([100.0, 1000.0, 10_000.0]), np.array([5.0, 4.0, 3.0])
    assert tokens_to(4.5, tokens, losses) == pytest.approx(100 * 10**0.5)
    assert tokens_to(4.0, tokens, losses) == pytest.approx(1000)
    assert np.isnan(tokens_to(2.9, tokens, losses))  # never reached
    assert np.isnan(tokens_to(5.0, tokens, losses))  # reached before anyone looked


def test_levels_are_those_that_three_batches_reach():
    tokens = np.array([1.0, 2.0])
    curves = [(tokens, np.array([high, low])) for high, low in ((5, 3), (5, 3.5), (4.8, 4), (np.inf, np.inf))]
    found = levels(curves)
    assert found[0] < 4.8 and found[0] == pytest.approx(4.8, rel=0.021)
    assert found[-1] >= 4 and found[-1] == pytest.approx(4, rel=0.021)
    assert np.diff(np.log(found)) == pytest.approx(-0.02)
    assert len(levels(curves[:2])) == 0


def test_the_unit_of_the_loss_moves_the_constant_and_not_the_exponent():
    losses, law = np.array([3.0, 4.0, 5.0]), BatchLaw(1.21e9, 6.24)
    of_bytes = fit(losses / 2, law.batch(losses))
    assert of_bytes.p == pytest.approx(6.24) and pytest.approx(1.21e9 / 2**6.24) == of_bytes.A


def test_groups_share_the_exponent_and_have_constants_of_their_own():
    """The group of the larger constant has the larger losses: through all points the law would seem to fall."""
    losses, groups = np.array([3.0, 3.3, 3.6, 4.0, 4.4, 4.8]), ["a"] * 3 + ["b"] * 3
    batches = np.array([1e6] * 3 + [2e7] * 3) / losses**5
    found = fit(losses, batches, groups)
    assert found.p == pytest.approx(5) and pytest.approx(np.sqrt(1e6 * 2e7)) == found.A
    assert fit(losses, batches).p < 0
    assert np.isnan(fit([4.0, 4.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]).p)


def test_what_no_points_determine_is_not_a_number():
    assert (
        np.isnan(fit([], []).p)
        and np.isnan(fit([4.0, 3.0], [100.0, 200.0]).p)
        and np.isnan(fit([4.0] * 3, [100.0] * 3).p)
    )


def test_the_interval_over_seeds_of_a_mean_is_students():
    """The jackknife of a mean is its standard error."""
    values = np.array([5.0, 6.0, 8.0])
    found = over_seeds(lambda seeds: values[seeds].mean(), 3)
    reach = 4.302653 * values.std(ddof=1) / np.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((19 / 3, 19 / 3 - reach, 19 / 3 + reach))
    assert over_seeds(lambda seeds: values[seeds].mean(), 1).low == -np.inf


@pytest.mark.parametrize(("loss", "tokens"), [(5, 5.3e4), (4, 2.1e5), (3, 1.3e6), (2.5, 4.0e6)])
def test_the_law_of_the_paper(loss, tokens):
    assert PAPER.batch(loss) == pytest.approx(tokens, rel=0.03)
