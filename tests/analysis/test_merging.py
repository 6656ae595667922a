"""Coefficients against explicit sums, merges against numpy, and merges as runs."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis import random_lines as lines
from formats.conversions import HISTORY, KEYS, SHARED, converted, expected, needs_shared

import cpmjax
from cpmjax.analysis import geometry, merging
from cpmjax.analysis.rows import RowLosses
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD

STEPS = [2, 4, 6, 8, 10, 12]
BATCH = lines.batch()


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return lines.write(tmp_path_factory.mktemp("runs") / "trunk", STEPS)


def theta(series, step):
    return lines.vector(series.parameters(step))


# Coefficients.


@pytest.mark.parametrize(
    "coefficients",
    [
        merging.lawa(STEPS, 4),
        merging.ema(STEPS, 0.8),
        merging.wsm(STEPS, [0.9, 0.7, 0.4, 0.2, 0.05]),
        merging.wsm(STEPS, WSD(warmup=0, stable=2, decay=10, shape="exponential")),
        merging.extrapolated(merging.lawa(STEPS[:-1], 3), merging.lawa(STEPS, 3), 1.7),
    ],
    ids=["lawa", "ema", "wsm", "wsm of a schedule", "extrapolated"],
)
def test_coefficients_add_up_to_1(coefficients):
    assert sum(coefficients.values()) == pytest.approx(1, abs=1e-12)
    assert list(coefficients) == sorted(coefficients)


def test_lawa():
    assert merging.lawa(STEPS, 1) == {12: 1.0}
    assert merging.lawa(STEPS, 4) == {6: 0.25, 8: 0.25, 10: 0.25, 12: 0.25}
    for window in (0, 7):
        with pytest.raises(UserError, match=f"window = {window}: expected 1 to 6"):
            merging.lawa(STEPS, window)


def test_ema_is_the_recursion_without_its_beginning():
    values = np.random.default_rng(0).normal(size=len(STEPS))
    average, total = 0.0, 0.0
    for value in values:
        average, total = 0.7 * average + 0.3 * value, 0.7 * total + 0.3
    coefficients = merging.ema(STEPS, 0.7)
    assert sum(c * value for c, value in zip(coefficients.values(), values, strict=True)) == pytest.approx(
        average / total
    )


def test_wsm_gives_every_update_its_share():
    """sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_(i-1)), in float64."""
    thetas = np.random.default_rng(0).normal(size=(6, 1000))
    shares = [0.95, 0.8, 0.3, 0.3, 0.1]
    by_updates = thetas[0] + sum(w * (b - a) for w, (a, b) in zip(shares, itertools.pairwise(thetas), strict=True))
    coefficients = np.array(list(merging.wsm(STEPS, shares).values()))
    np.testing.assert_allclose(coefficients @ thetas, by_updates, atol=1e-12)


def test_wsm_of_a_schedule_takes_the_mean_rate_of_each_interval():
    found = merging.wsm([100, 104, 108], WSD(warmup=0, stable=100, decay=8, shape="linear", floor=0.0))
    first, second = np.mean([7, 6, 5, 4]) / 8, np.mean([3, 2, 1, 0]) / 8
    assert found == pytest.approx({100: 1 - first, 104: first - second, 108: second})


def test_wsm_at_the_peak_is_the_last_checkpoint_and_at_nothing_the_first():
    assert merging.wsm([1, 2, 3], [1, 1]) == {1: 0, 2: 0, 3: 1}
    assert merging.wsm([1, 2, 3], [0, 0]) == {1: 1, 2: 0, 3: 0}


def test_wsm_falling_evenly_is_the_mean():
    assert merging.wsm([1, 2, 3, 4], [0.75, 0.5, 0.25]) == pytest.approx(merging.lawa([1, 2, 3, 4], 4))


def test_wsm_wants_a_share_for_every_interval():
    with pytest.raises(UserError, match="2 shares of the peak: expected 3"):
        merging.wsm([1, 2, 3, 4], [0.5, 0.2])


def test_extrapolation_goes_on_along_the_line():
    earlier, later = {2: 0.5, 4: 0.5}, {4: 0.5, 6: 0.5}
    assert merging.extrapolated(earlier, later, 0) == {2: 0, 4: 0.5, 6: 0.5}
    assert merging.extrapolated(earlier, later, -1) == {2: 0.5, 4: 0.5, 6: 0}
    assert merging.extrapolated(earlier, later, 1) == {2: -0.5, 4: 0.5, 6: 1.0}


# Merges.


def test_a_merge_is_the_sum(series):
    for coefficients in (merging.ema(STEPS, 0.8), {2: -1.5, 6: 0.5, 12: 2.0}):
        explicit = sum(c * theta(series, step) for step, c in coefficients.items())
        found = merging.merge(series, coefficients)
        np.testing.assert_allclose(lines.vector(found), explicit, atol=2e-6)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_a_slice_in_many_parts_is_the_same(series, monkeypatch):
    whole = merging.merge(series, merging.ema(STEPS, 0.8))
    monkeypatch.setattr(merging, "_AT_ONCE", 40)
    jax.tree.map(np.testing.assert_array_equal, merging.merge(series, merging.ema(STEPS, 0.8)), whole)


def test_the_wsm_identity_on_checkpoints(series):
    shares = [0.95, 0.8, 0.3, 0.3, 0.1]
    pairs = zip(shares, itertools.pairwise(STEPS), strict=True)
    by_updates = theta(series, 2) + sum(w * (theta(series, b) - theta(series, a)) for w, (a, b) in pairs)
    np.testing.assert_allclose(lines.vector(merging.merge(series, merging.wsm(STEPS, shares))), by_updates, atol=1e-6)


def test_lawa_of_one_is_the_last_checkpoint(series):
    found = merging.merge(series, merging.lawa(STEPS, 1))
    jax.tree.map(np.testing.assert_array_equal, found, series.parameters(12))


def test_a_merge_is_linear_in_its_coefficients(series):
    one, other = merging.lawa(STEPS, 6), merging.ema(STEPS, 0.5)
    mixed = {step: 0.3 * one[step] + 0.7 * other[step] for step in STEPS}
    expected = 0.3 * lines.vector(merging.merge(series, one)) + 0.7 * lines.vector(merging.merge(series, other))
    np.testing.assert_allclose(lines.vector(merging.merge(series, mixed)), expected, atol=1e-6)


def test_a_merge_of_identical_checkpoints_is_the_checkpoint(series, monkeypatch):
    only = series.weights(6)
    monkeypatch.setattr(series, "weights", lambda step: only)
    found = merging.merge(series, merging.ema(STEPS, 0.8))
    np.testing.assert_allclose(lines.vector(found), theta(series, 6), rtol=5e-7)


def test_bf16_checkpoints_are_summed_in_float32(series, monkeypatch):
    """64 terms of one size: summed in bf16, the later ones would be lost."""
    stored = {step: jax.tree.map(lambda x: x.astype(jnp.bfloat16), lines.tree(step)) for step in range(64)}
    monkeypatch.setattr(series, "weights", lambda step: lines.as_weights(stored[step]))
    explicit = np.mean([lines.vector(each) for each in stored.values()], axis=0)
    found = merging.merge(series, merging.lawa(list(stored), 64))
    np.testing.assert_allclose(lines.vector(found), explicit, atol=2e-6)


def test_branch_and_trunk_merge_together(series):
    branch = lines.write(series.path.parent / "branch", [9, 10], seed=70, parent=series, at=8)
    coefficients = merging.lawa(branch.steps, 4)
    assert list(coefficients) == [6, 8, 9, 10]
    explicit = (theta(series, 6) + theta(series, 8) + theta(branch, 9) + theta(branch, 10)) / 4
    np.testing.assert_allclose(lines.vector(merging.merge(branch, coefficients)), explicit, atol=1e-6)


def test_what_cannot_be_merged(series):
    with pytest.raises(UserError, match=r"add up to 1\.5; expected 1"):
        merging.merge(series, {2: 1.0, 4: 0.5})
    with pytest.raises(UserError, match="no checkpoint of step 5"):
        merging.merge(series, {4: 0.5, 5: 0.5})


def test_a_merge_becomes_a_run(series, tmp_path):
    coefficients = {8: 0.25, 10: 0.75, 12: 0.0}
    written = merging.write_merge(series, coefficients, tmp_path / "merge")
    assert written.steps == [10] and written.parent is None
    facts = (written.stage(10), written.tokens(10), written.learning_rate(10), written.optimizer_state(10))
    assert facts == ("stable", 80, 0.01, None)
    jax.tree.map(np.testing.assert_array_equal, written.parameters(10), merging.merge(series, coefficients))
    provenance = json.loads((tmp_path / "merge" / "provenance.json").read_text())
    assert provenance["kind"] == "merge" and provenance["source"] == str(series.path.resolve())
    assert provenance["coefficients"] == {"8": 0.25, "10": 0.75, "12": 0.0}
    assert cpmjax.load(tmp_path / "merge")(BATCH["tokens"]).shape == (6, 12, lines.MODEL.vocabulary)
    with pytest.raises(UserError, match="holds a run already"):
        merging.write_merge(series, coefficients, tmp_path / "merge")


@needs_shared
def test_merges_of_an_imported_history(tmp_path):
    converted(SHARED / HISTORY.name, tmp_path / "history", "--to=run", *KEYS)
    history = cpmjax.Series(tmp_path / "history")
    stable = history.stable()
    coefficients = merging.lawa(stable, 3)
    explicit = np.mean([theta(history, step) for step in stable[-3:]], axis=0)
    np.testing.assert_allclose(lines.vector(merging.merge(history, coefficients)), explicit, atol=1e-6)
    tokens = expected()["eval_input_ids"]
    ones = np.ones_like(tokens[:, 1:])
    places = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
    rows = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places, "segments": ones}
    rows["weights"] = ones.astype(np.float32)
    loss = RowLosses.of(history)
    last, merge, decayed = (
        np.asarray(loss(parameters, rows))
        for parameters in (
            history.parameters(300_000),
            merging.merge(history, coefficients),
            history.parameters(390_000),
        )
    )
    share = merging.share_of_drop(last, merge, decayed)
    assert share.low < share.value < share.high < 1
    written = merging.write_merge(history, coefficients, tmp_path / "merge")
    assert (written.path / "tokenizer.model").exists() and written.steps == [300_000]
    jax.tree.map(np.testing.assert_array_equal, written.parameters(300_000), merging.merge(history, coefficients))


# What a merge is worth.


def test_a_share_of_the_drop():
    draw = np.random.default_rng(0)
    last = draw.normal(3.0, 0.5, 100)
    decayed = last - 0.2
    assert str(merging.share_of_drop(last, last, decayed)) == "0.0000 [0.0000, 0.0000]"
    assert merging.share_of_drop(last, decayed, decayed).value == pytest.approx(1)
    half = merging.share_of_drop(last, last - 0.1 + draw.normal(0, 0.02, 100), decayed)
    assert half.low < 0.5 < half.high and half.high - half.low < 0.06


# How merges lie to each other.


def test_inner_products(series, monkeypatch):
    thetas = np.stack([theta(series, step) for step in STEPS])
    moved = thetas - thetas[0]
    weights = [series.weights(step) for step in STEPS]
    found = geometry.inner_products(weights)
    np.testing.assert_allclose(found, moved @ moved.T, rtol=1e-12, atol=1e-9)
    monkeypatch.setattr(geometry, "_AT_ONCE", 4 * 6 * 100)
    monkeypatch.setattr(geometry, "_COLUMNS", 7)
    np.testing.assert_allclose(geometry.inner_products(weights), found, rtol=1e-12, atol=1e-9)


def test_inner_products_of_merges_follow_from_those_of_checkpoints(series):
    merges = [merging.lawa(STEPS[:end], 3) for end in (3, 4, 5, 6)]
    gram = geometry.inner_products([series.weights(step) for step in STEPS])
    found = geometry.of_mixtures(gram, merging.as_rows(merges, STEPS))
    explicit = np.stack([lines.vector(merging.merge(series, each)) for each in merges]) - theta(series, STEPS[0])
    np.testing.assert_allclose(found, explicit @ explicit.T, rtol=1e-5)


def test_straightness():
    draw = np.random.default_rng(0)
    direction = draw.normal(size=500)
    line = np.outer([0.0, 1.0, 3.0, 3.5], direction)
    found = geometry.straightness(line @ line.T)
    np.testing.assert_allclose(found.cosines, 1)
    assert found.first_component == pytest.approx(1)
    there_and_back = np.outer([0.0, 1.0, 0.0], direction)
    np.testing.assert_allclose(geometry.straightness(there_and_back @ there_and_back.T).cosines, -1)
    points = draw.normal(size=(8, 500))
    centred = points - points.mean(0)
    singular = np.linalg.svd(centred, compute_uv=False) ** 2
    found = geometry.straightness(points @ points.T)
    assert found.first_component == pytest.approx(singular[0] / singular.sum())
    steps = np.diff(points, axis=0)
    cosine = steps[2] @ steps[3] / np.linalg.norm(steps[2]) / np.linalg.norm(steps[3])
    assert found.cosines[2] == pytest.approx(cosine)
    with pytest.raises(UserError, match="2 points: expected at least 3"):
        geometry.straightness(np.eye(2))


def test_a_random_walk_has_steps_at_right_angles():
    found = geometry.straightness(geometry.random_walk(200))
    np.testing.assert_allclose(found.cosines, 0, atol=1e-12)
    assert found.first_component == pytest.approx(6 / np.pi**2, rel=0.02)  # of a long walk in many dimensions
    windows = np.eye(200)[:-1] + np.eye(200)[1:]
    np.testing.assert_allclose(
        geometry.straightness(geometry.of_mixtures(geometry.random_walk(200), windows / 2)).cosines, 0.5
    )
