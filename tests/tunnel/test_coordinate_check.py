"""The coordinate check: its measurements against numpy, its judgement on made-up coordinates, and planted faults."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import tunnel_jobs
from tunnel_jobs import made_up_coordinates as made_up

from cpmjax.model import mup
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, ModelConfig
from cpmjax.tunnel import coordinate_check as check
from cpmjax.tunnel.faults import FAULTS
from cpmjax.tunnel.sizes import Axis

MODEL = ModelConfig(vocabulary=61, width=16, layers=3, heads=4, kv_heads=2, feed_forward=40, dim_model_base=8)


def packed_rows() -> dict[str, np.ndarray]:
    """Two documents and some padding in each row."""
    tokens = np.random.default_rng(0).integers(0, MODEL.vocabulary, (2, 12)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 7 + [2] * 5], np.int32)
    positions = np.array([[*range(5), *range(5), 0, 0], [*range(7), *range(5)]], np.int32)
    targets, weights = np.roll(tokens, -1, axis=1), (segments == np.roll(segments, -1, axis=1)).astype(np.float32)
    return {"tokens": tokens, "segments": segments, "positions": positions, "targets": targets, "weights": weights}


def test_coordinates_are_those_of_the_forward_pass():
    """Attention logits are what softmax is taken of: recomputed head by head from the layer's own query and key."""
    parameters, batch = initialise(MODEL, jax.random.key(1)), packed_rows()
    found = check.coordinates(MODEL, ComputeConfig(), parameters, mup.multipliers(MODEL), batch)
    arguments = (batch["tokens"], batch["positions"], batch["segments"])
    logits, taps = MiniCPM(MODEL, parameters)(*arguments, taps=("query", "key", "residual", "embedding"))
    np.testing.assert_allclose(found["logits"], logits, atol=1e-6)
    scores, weights = np.asarray(logits, np.float64), batch["weights"]
    of_targets = np.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
    losses = np.log(np.exp(scores).sum(axis=-1)) - of_targets
    assert float(found["loss"]) == pytest.approx((weights * losses).sum() / weights.sum(), abs=1e-5)
    np.testing.assert_allclose(found["embedding"], taps["embedding"], atol=1e-6)
    np.testing.assert_allclose(found["residual stream"], taps["residual"][-1], atol=1e-5)
    query, key = np.asarray(taps["query"], np.float64), np.asarray(taps["key"], np.float64)
    scores = np.asarray(found["attention logits"]).reshape(3, 2, 4, 12, 12)  # groups and repeats are heads
    for layer, row, head, i, j in np.ndindex(scores.shape):
        seen = j <= i and batch["segments"][row, i] == batch["segments"][row, j]
        expected = query[layer, row, i, head] @ key[layer, row, j, head // 2] / math.sqrt(4) if seen else 0.0
        assert scores[layer, row, head, i, j] == pytest.approx(expected, abs=1e-5)


def test_sizes_are_means_over_everything_but_the_layer():
    random = np.random.default_rng(0)
    values = {"attention": random.normal(size=(3, 2, 5)), "logits": random.normal(size=(2, 5, 7))}
    first = {name: random.normal(size=value.shape) for name, value in values.items()}
    found = check._sizes(values, first)
    np.testing.assert_allclose(found["attention"][0], np.abs(values["attention"]).mean(axis=(1, 2)), rtol=1e-5)
    moved = np.abs(values["logits"] - first["logits"]).mean()
    assert float(found["logits"][1]) == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 48, 48), (3, 64, 160), (1, 160, 64)])
def test_operator_norms_are_numpys_within_a_per_cent(shape):
    random = np.random.default_rng(0)
    matrix = random.normal(size=shape).astype(np.float32)
    moved = matrix + 0.1 * np.outer(random.normal(size=shape[1]), random.normal(size=shape[2])).astype(np.float32)
    size, change = check.operator_norms({"layers/gate": moved}, {"layers/gate": matrix})["spectral gate"]
    unit = math.sqrt(shape[2] / shape[1])
    assert float(size) == pytest.approx(np.linalg.norm(moved, 2, axis=(1, 2)).mean() / unit, rel=0.01)
    assert float(change) == pytest.approx(np.linalg.norm(moved - matrix, 2, axis=(1, 2)).mean() / unit, rel=0.01)


# Judgement, on coordinates that follow a power of the size exactly.


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5])
def test_a_slope_is_the_power_of_the_size(power):
    found = {(s.quantity, s.kind, s.step): s.value for s in check.slopes(made_up(power))}
    assert found["attention 1", "change", 3] == pytest.approx(power, abs=1e-9)
    others = [value for key, value in found.items() if key != ("attention 1", "change", 3)]
    assert others == pytest.approx([0.0] * len(others), abs=1e-9)
    assert ("attention 1", "change", 0) not in found  # nothing has changed yet


@pytest.mark.parametrize("quantity", ["embedding", "attention 0", "final hidden", "loss"])
@pytest.mark.parametrize("kind", ["size", "change"])
def test_a_quantity_beyond_the_bar_fails_the_check_and_is_named(quantity, kind):
    for power, passes in ((0.19, True), (-0.19, True), (0.21, False), (-0.21, False)):
        verdict = check.verdicts(check.slopes(made_up(power, quantity, kind)), "minicpm", ["width"])[0]
        assert verdict.passed is passes
        assert verdict.measured == f"{kind} of {quantity} at step 3: slope {power:+.2f} ± 0.00"


@pytest.mark.parametrize("kind", ["size", "change"])
def test_logits_may_shrink_over_the_width_as_random_ones_do(kind):
    for power, passes in ((0.19, True), (-0.69, True), (0.21, False), (-0.71, False)):
        verdict = check.verdicts(check.slopes(made_up(power, "logits", kind)), "minicpm", ["width"])[0]
        assert verdict.passed is passes
        assert verdict.measured == f"{kind} of logits at step 3: slope {power:+.2f} ± 0.00 (expected: -0.5 to 0)"
    # What every size has in common with it is no sign of a fault, and over layers nothing of the kind is expected.
    assert not check.control_verdict(
        check.slopes(made_up(-0.48, "logits", name="slow_embedding")), "slow_embedding"
    ).passed
    (verdict,) = check.verdicts(check.slopes(made_up(-0.48, "logits", axis="layers")), "minicpm", ["layers"])
    assert not verdict.passed


def test_operator_norms_have_a_bar_of_their_own():
    coordinates, norms = check.verdicts(check.slopes(made_up(0.3, "spectral gate")), "minicpm", ["width"])
    assert coordinates.passed and norms.passed and "spectral gate" in norms.measured
    assert not check.verdicts(check.slopes(made_up(0.35, "spectral gate")), "minicpm", ["width"])[1].passed


def test_depth_takes_layers_together_and_judges_what_leaves_the_stack():
    slopes = check.slopes(made_up(1.0, "attention 1", axis="layers"))
    by_name = {(s.quantity, s.kind, s.step): s for s in slopes}
    of_mean = np.polyfit([1, 2, 3, 4], np.log2([(1 + 2**n) / 2 for n in (1, 2, 3, 4)]), 1)[0]
    assert by_name["attention", "change", 3].value == pytest.approx(of_mean)
    (verdict,) = check.verdicts(slopes, "minicpm", ["layers"])
    assert verdict.passed and verdict.criterion.endswith("over layers")
    (verdict,) = check.verdicts(check.slopes(made_up(0.25, "final hidden", axis="layers")), "minicpm", ["layers"])
    assert not verdict.passed and "final hidden" in verdict.measured


def test_a_trial_that_diverged_fails_the_check_and_counts_as_caught():
    rows = made_up(0.0, name="no_matrix_rate")
    rows.append({"parametrisation": "no_matrix_rate", "axis": "width", "width": 32, "seed": 0, "status": "diverged"})
    slopes = check.slopes(rows)
    assert not check.verdicts(slopes, "no_matrix_rate", ["width"])[0].passed
    assert check.control_verdict(slopes, "no_matrix_rate").passed


def test_trials_that_all_diverge_at_once_are_not_a_pass():
    at_the_start = [row | {"status": "diverged"} for row in made_up(0.0, name="no_matrix_rate") if row["step"] == 0]
    verdicts = check.verdicts(check.slopes(at_the_start), "no_matrix_rate", ["width"])
    assert [verdict.passed for verdict in verdicts] == [False, False]
    assert check.control_verdict(check.slopes(at_the_start), "no_matrix_rate").passed


def test_a_fault_is_caught_beyond_its_own_bar():
    for power, caught in ((0.39, False), (0.41, True)):
        assert (
            check.control_verdict(check.slopes(made_up(power, name="no_matrix_rate")), "no_matrix_rate").passed
            is caught
        )
    verdict = check.control_verdict(check.slopes(made_up(0.35, name="growing_heads")), "growing_heads")
    assert verdict.passed and "attention 1" in verdict.measured


# The real thing, in small.


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Slopes of MiniCPM and of every planted fault over 8 times the width."""
    config = tunnel_jobs.family(tmp_path_factory)
    planned = check.make_trials(config, [Axis("width", (64, 128, 256, 512))], ["minicpm", *FAULTS], seeds=2)
    return tunnel_jobs.slopes_of(config, planned, tmp_path_factory.mktemp("check"))


@pytest.mark.slow
def test_minicpm_passes(checked):
    verdicts = check.verdicts(checked, "minicpm", ["width"])
    assert len(verdicts) == 2 and all(verdict.passed for verdict in verdicts), verdicts


# The quantity in which theory says that the fault must show, and the sign of its slope.
SHOWS = {
    "no_matrix_rate": ("feed-forward", +1),
    "no_matrix_init": ("feed-forward", +1),
    "no_logit_scale": ("logits", +1),
    "slow_embedding": ("embedding", -1),
    "growing_heads": ("attention logits", +1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_planted_fault_is_caught_where_it_is(checked, name):
    verdict = check.control_verdict(checked, name)
    assert verdict.passed, verdict
    assert not check.verdicts(checked, name, ["width"])[0].passed
    quantity, sign = SHOWS[name]
    mine = [s for s in checked if s.parametrisation == name and check.base_name(s.quantity) == quantity and s.judged]
    assert max(sign * slope.value for slope in mine) > FAULTS[name].bar, mine


@pytest.mark.slow
def test_a_slow_embedding_hardly_shows_in_the_branches(checked):
    """Why the check looks at embedding and logits: no branch comes to the bar of a fault (the paper's Table 7 read to
    the letter)."""
    mine = [s for s in checked if s.parametrisation == "slow_embedding" and s.judged]
    branches = [s for s in mine if check.base_name(s.quantity) in ("attention", "feed-forward")]
    assert max(abs(s.value) for s in branches) < 0.40 < max(abs(s.value) for s in mine)
    embedding = {s.step: s.value for s in mine if s.quantity == "embedding" and s.kind == "change"}
    assert embedding[3] == pytest.approx(-1.0, abs=0.1)  # m times too slow
