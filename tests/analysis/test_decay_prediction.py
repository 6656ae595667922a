"""The loss laws: published numbers, what they must not depend on, and whether a fit finds what was planted."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from cpmjax.analysis import convex_bound
from cpmjax.analysis.convex_bound import ConvexBound
from cpmjax.analysis.decay_prediction import LAWS, Curve, curve, fit, predict, relative_errors, score
from cpmjax.analysis.multi_power import MultiPower
from cpmjax.analysis.tissue import Tissue
from cpmjax.run.errors import UserError

# Fitted by the authors of the law to models of 25, 100 and 400 million parameters.
PUBLISHED = {
    25: MultiPower(3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    100: MultiPower(2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    400: MultiPower(2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
PLANTED = {
    Tissue: Tissue(L0=2.6, A=8.0, alpha=0.45, C=1.2, memory=25.0),
    MultiPower: MultiPower(L0=2.5, A=7.0, alpha=0.4, B=40.0, C=1.5, beta=0.6, gamma=0.5),
    ConvexBound: ConvexBound(L0=2.0, D2=4.0, G2=60.0),
}


def rates(warmup=20, stable=400, decay=0, peak=0.01, floor=0.1):
    decayed = floor ** (np.arange(1, decay + 1) / max(decay, 1))
    return peak * np.concatenate([np.arange(1, warmup + 1) / warmup, np.ones(stable), decayed])


def cosine(warmup=20, length=400, peak=0.01):
    x = np.arange(1, length + 1) / length
    return peak * np.concatenate([np.arange(1, warmup + 1) / warmup, 0.55 + 0.45 * np.cos(np.pi * x)])


def planted(law, rates_S, name="planted", every=5, noise=0.0):
    steps_T = np.arange(30, len(rates_S) + 1, every)
    losses_T = predict(law, rates_S, steps_T, warmup=20)
    losses_T = losses_T * np.exp(noise * np.random.default_rng(0).normal(size=losses_T.size))
    return Curve(name, rates_S, steps_T, losses_T, warmup=20)


# What was published.


@pytest.mark.parametrize(("size", "updates", "loss"), [(25, 23905, 3.2669), (100, 23905, 2.9360), (400, 23937, 2.7005)])
def test_multi_power_law_of_the_authors_on_their_wsd_run(size, updates, loss):
    """24,000 updates: a warm-up of 2,160 in a line from 0, 3e-4 until 20,000, then exponential, towards 3e-5; the last
    loss of each log is that at index 23,904 or 23,936. Their fits count the warm-up's rises as negative drops."""
    peak, x = 3e-4, np.arange(4000) / 4000
    rates_S = np.concatenate([np.linspace(0, peak, 2160), np.full(17840, peak), peak * 0.1**x])
    assert predict(PUBLISHED[size], rates_S, np.array([updates]))[0] == pytest.approx(loss, abs=6e-5)


def flat_then(updates, share, shape):
    """The decay's first rate is still the peak, as in the package of the bound's authors."""
    last = round(updates * share)
    return np.concatenate([np.ones(updates - last), shape(np.arange(last) / last)])


SCHEDULES = {
    "constant": lambda n: np.ones(n),
    "cosine": lambda n: (1 + np.cos(np.pi * np.arange(n) / n)) / 2,
    "linear": lambda n: 1 - np.arange(n) / n,
    "wsd20 linear": lambda n: flat_then(n, 0.2, lambda x: 1 - x),
    "wsd20 1-sqrt": lambda n: flat_then(n, 0.2, lambda x: 1 - np.sqrt(x)),
    "wsd10 linear": lambda n: flat_then(n, 0.1, lambda x: 1 - x),
}


@pytest.mark.parametrize(
    ("updates", "name", "bound", "rate"),
    [
        (400, "constant", 2.751, 0.364),
        (400, "cosine", 2.068, 0.965),
        (400, "linear", 2.013, 0.991),
        (400, "wsd20 linear", 2.186, 0.507),
        (400, "wsd20 1-sqrt", 2.146, 0.537),
        (4000, "constant", 3.142, 0.318),
        (4000, "cosine", 2.061, 0.970),
        (4000, "linear", 2.002, 0.999),
        (4000, "wsd20 linear", 2.164, 0.513),
        (4000, "wsd20 1-sqrt", 2.129, 0.542),
        (4000, "wsd10 linear", 2.288, 0.460),
    ],
)
def test_convex_bound_at_its_best_rate(updates, name, bound, rate):
    """Times and over the square root of the number of updates, for D = G = 1."""
    best_rate, best_bound = convex_bound.best_scale(SCHEDULES[name](updates))
    assert best_bound * np.sqrt(updates) == pytest.approx(bound, abs=5.1e-4)
    assert best_rate * np.sqrt(updates) == pytest.approx(rate, abs=5.1e-4)
    for factor in (0.9, 1.1):  # it is the best one
        distance, noise = convex_bound.terms(SCHEDULES[name](updates) * best_rate * factor)
        assert distance + noise > best_bound


# The formulas, written out.


def tissue_by_hand(law, rates_S, t):
    momentum = annealed = 0.0
    for k in range(1, t):
        momentum = law.lam * momentum + rates_S[k - 1] - rates_S[k]
        annealed += momentum
    return law.L0 + law.A * sum(rates_S[:t]) ** -law.alpha - law.C * annealed


def multi_power_by_hand(law, rates_S, t):
    fallen = 0.0
    for k in range(1, t):
        area = sum(rates_S[k:t])
        fallen += (rates_S[k - 1] - rates_S[k]) * (1 - (1 + law.C * rates_S[k] ** -law.gamma * area) ** -law.beta)
    return law.L0 + law.A * sum(rates_S[:t]) ** -law.alpha - law.B * fallen


def convex_bound_by_hand(law, rates_S, t):
    eta = rates_S[:t]
    last_iterate = sum(eta[k] / sum(eta[k + 1 :]) * sum(eta[k:] ** 2) / sum(eta[k:]) for k in range(t - 1))
    return law.L0 + law.D2 / (2 * sum(eta)) + law.G2 * (sum(eta**2) / (2 * sum(eta)) + last_iterate / 2)


BY_HAND = {Tissue: tissue_by_hand, MultiPower: multi_power_by_hand, ConvexBound: convex_bound_by_hand}
RISE_AND_FALL = np.concatenate([rates(10, 20, 15), cosine(5, 20, peak=0.02), np.full(5, 0.002), rates(0, 5, 10)])


@pytest.mark.parametrize("kind", LAWS)
def test_a_law_is_its_formula(kind):
    """On a schedule that falls, jumps, rises in a warm-up and stays."""
    law, steps_T = PLANTED[kind], np.array([1, 2, 11, 44, 45, 70, len(RISE_AND_FALL)])
    by_hand = [BY_HAND[kind](law, RISE_AND_FALL, t) for t in steps_T]
    assert predict(law, RISE_AND_FALL, steps_T) == pytest.approx(by_hand, rel=1e-12)


# What holds of every law.


@pytest.mark.parametrize("kind", LAWS)
def test_the_future_changes_nothing(kind):
    steps_T = np.arange(30, 301, 30)
    there = predict(PLANTED[kind], rates(stable=280, decay=100), steps_T, 20)
    assert there == pytest.approx(predict(PLANTED[kind], rates(stable=400), steps_T, 20), rel=1e-13)
    assert not np.allclose(predict(PLANTED[kind], rates(stable=200, decay=100), steps_T, 20), there)


@pytest.mark.parametrize("kind", [Tissue, MultiPower])
def test_a_constant_rate_has_no_annealing_term(kind):
    law, rates_S, steps_T = PLANTED[kind], np.full(300, 0.01), np.arange(1, 301)
    without = law.L0 + law.A * (0.01 * steps_T) ** -law.alpha
    assert predict(law, rates_S, steps_T) == pytest.approx(without, rel=1e-13)
    # Nor has a warm-up, unless its rises are counted.
    steps_T = np.arange(20, 421)
    without = law.L0 + law.A * np.cumsum(rates())[steps_T - 1] ** -law.alpha
    assert predict(law, rates(), steps_T, warmup=20) == pytest.approx(without, rel=1e-13)
    assert np.all(predict(law, rates(), steps_T, warmup=0) > without)


@pytest.mark.parametrize(("kind", "held"), [(Tissue, 40), (MultiPower, 20)])
def test_the_annealing_term_adds_up_over_what_is_put_together(kind, held):
    """A second piece adds what it adds alone after the rate before it, and meanwhile the first goes on acting as at its
    last rate: for as many updates (Tissue), or for the same area (multi-power law)."""
    law, first = PLANTED[kind], rates(0, 50, 50)
    second = first[-1] * np.linspace(0.9, 0.1, 40)  # the area of 20 updates at first[-1]

    def annealing(*pieces):
        rates_S = np.concatenate(pieces)
        return predict(law, rates_S, [len(rates_S)])[0] - law.L0 - law.A * np.sum(rates_S) ** -law.alpha

    alone = annealing(first[-1:], second)
    assert annealing(first, second) == pytest.approx(annealing(first, np.full(held, first[-1])) + alone, rel=1e-9)
    assert alone < 0 > annealing(first)


# Fits.


@pytest.mark.parametrize("kind", LAWS)
def test_a_fit_finds_what_was_planted_and_foretells_another_decay(kind):
    """In the unit of the rates: their peak is 0.01, that of the fit is 1."""
    law = PLANTED[kind]
    seen = [planted(law, rates(stable=380)), planted(law, rates(stable=340, decay=40)), planted(law, cosine())]
    found = fit(kind, seen)
    new = planted(law, rates(stable=300, decay=80))
    assert score(found, new).worst < 1e-4
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(law), rel=0.02)


@pytest.mark.parametrize("kind", [Tissue, MultiPower])
def test_a_trunk_alone_does_not_determine_a_decay(kind):
    trunk = planted(PLANTED[kind], rates(), "trunk", noise=1e-3)
    with pytest.raises(UserError, match=rf"trunk: the rate never drops, .* {kind.annealing[-1]} of {kind.__name__}"):
        fit(kind, [trunk])
    errors = relative_errors(PLANTED[kind], [trunk])
    assert {name for name, error in errors.items() if np.isinf(error)} == set(kind.annealing)
    decay = planted(PLANTED[kind], rates(stable=340, decay=40), noise=1e-3)
    assert max(relative_errors(PLANTED[kind], [trunk, decay]).values()) < np.inf
    fitted_before_it_drops = dataclasses.replace(decay, steps_T=decay.steps_T[:50], losses_T=decay.losses_T[:50])
    with pytest.raises(UserError, match="the rate never drops"):
        fit(kind, [fitted_before_it_drops])


def test_the_convex_bound_is_fitted_on_a_trunk_alone():
    law = PLANTED[ConvexBound]
    found = fit(ConvexBound, [planted(law, rates())])
    assert score(found, planted(law, rates(stable=340, decay=60)).after(360)).worst < 1e-3


# From a log.


class Logged:
    """What `curve` asks of a series."""

    def __init__(self, records, name="logged"):
        self.name, self.path, self.records = name, f"runs/{name}", records

    def log(self):
        return self.records


def records():
    stages = ["warmup"] * 20 + ["stable"] * 380 + ["decay"] * 40
    rows = []
    for step, (stage, rate) in enumerate(zip(stages, rates(20, 380, 40), strict=True), start=1):
        evaluated = {"heldout_loss": 3.0 - step / 1000} if step % 50 == 0 or step == 440 else {}
        rows.append({"step": step, "stage": stage, "learning_rate": float(rate), "loss": 5 - step / 100} | evaluated)
    return json.loads(json.dumps(rows))


def test_a_curve_of_held_out_losses():
    found = curve(Logged(records()))
    assert found.name == "logged" and found.warmup == 20
    assert found.rates_S == pytest.approx(rates(20, 380, 40))
    assert found.steps_T.tolist() == [50, 100, 150, 200, 250, 300, 350, 400, 440]
    assert found.losses_T == pytest.approx(3.0 - found.steps_T / 1000)
    assert found.after(399).steps_T.tolist() == [400, 440]


def test_a_curve_of_training_losses_counts_the_updates_before_them():
    found = curve(Logged(records()), "training", window=1)
    assert found.steps_T.tolist() == list(range(20, 440))
    assert found.losses_T == pytest.approx(5 - (found.steps_T + 1) / 100)
    windows = curve(Logged(records()), "training", window=11)
    assert len(windows.steps_T) == 38 and windows.losses_T == pytest.approx(5 - (windows.steps_T + 1) / 100)


def test_a_log_that_is_not_there_or_not_whole():
    with pytest.raises(UserError, match=r"runs/logged: no record \(an import has none\) in its log"):
        curve(Logged([]))
    with pytest.raises(UserError, match=r"runs/logged: 430 records in its log; expected one of every update"):
        curve(Logged(records()[10:]))
    bare = [{key: value for key, value in record.items() if key != "heldout_loss"} for record in records()]
    with pytest.raises(UserError, match="no held_out loss in its log after the warm-up"):
        curve(Logged(bare))


def test_steps_that_are_not_in_the_schedule():
    with pytest.raises(UserError, match="expected from the first positive rate on, to 440"):
        predict(PLANTED[Tissue], rates(20, 380, 40), np.array([441]))


def test_float64_stays_where_it_is_needed():
    predict(PLANTED[Tissue], rates(), np.array([100]))
    assert jax.numpy.ones(1).dtype == np.float32
