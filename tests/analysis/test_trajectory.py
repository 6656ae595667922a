"""Trajectories against plain numpy on whole arrays, and the geometry that any path has."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from analysis.synthetic import MODEL, SCHEDULE, parameters, write_series

from cpmjax.analysis import trajectory
from cpmjax.run.directory import Lines
from cpmjax.run.schedule import WSD

STEPS = (10, 20, 40, 50, 60)


def walk(*shape, count=len(STEPS), seed=0, kind=np.float32):
    draw = np.random.default_rng(seed)
    return [array.astype(kind) for array in np.cumsum(draw.standard_normal((count, *shape)), axis=0)]


def rows_of(path, steps=STEPS):
    rows = []
    for number, (step, now) in enumerate(zip(steps, path, strict=True)):
        behind = [path[number - back] if number >= back else None for back in (1, 2)]
        rows.append({"step": step, **trajectory.moves(now, *behind, path[0] if number else None)})
    return rows


def trajectory_of(path):
    (found,) = trajectory.trajectories(rows_of(path)).values()
    return found


@pytest.mark.parametrize("block", [2**22, 20])
@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16])
def test_numbers_are_those_of_whole_arrays(monkeypatch, block, kind):
    monkeypatch.setattr(trajectory, "_BLOCK", block)
    path = walk(9, 7, kind=kind)
    whole = np.stack([array.astype(np.float64) for array in path])
    norms, updates = np.sqrt((whole**2).sum((1, 2))), np.diff(whole, axis=0)
    lengths = np.sqrt((updates**2).sum((1, 2)))
    cosines = [(a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()) for a, b in itertools.pairwise(updates)]
    found = trajectory_of(path)
    assert found.steps.tolist() == list(STEPS)
    assert found.norm == pytest.approx(norms) and found.rms == pytest.approx(norms / math.sqrt(63))
    assert found.update[1:] == pytest.approx(lengths) and np.isnan(found.update[0])
    assert found.relative_update[1:] == pytest.approx(lengths / norms[:-1])
    assert found.largest_update[1:].tolist() == np.abs(updates).max((1, 2)).tolist()
    assert found.path[1:] == pytest.approx(lengths.cumsum())
    assert found.displacement[1:] == pytest.approx(np.sqrt(((whole[1:] - whole[0]) ** 2).sum((1, 2))))
    assert found.cosine[2:] == pytest.approx(cosines) and np.isnan(found.cosine[:2]).all()


def test_slices_together_are_what_their_concatenation_is():
    parts = [walk(4, 6), walk(5, seed=1), walk(3, 2, seed=2)]
    rows = [row | {"path": name} for name, path in zip("abc", parts, strict=True) for row in rows_of(path)]
    joined = [np.concatenate([part.ravel() for part in parts]) for parts in zip(*parts, strict=True)]
    (together,), alone = trajectory.trajectories(rows).values(), trajectory_of(joined)
    for name, values in vars(alone).items():
        assert getattr(together, name) == pytest.approx(values, nan_ok=True), name
    apart = trajectory.trajectories(rows, lambda row: row["path"])
    assert list(apart) == ["a", "b", "c"]
    assert apart["b"].norm == pytest.approx(trajectory_of(parts[1]).norm)


@pytest.mark.parametrize("seed", range(5))
def test_no_path_is_shorter_than_its_displacement(seed):
    found = trajectory_of(walk(30, seed=seed))
    assert (found.displacement[1:] <= found.path[1:] * (1 + 1e-12)).all()
    assert ((found.straightness[1:] > 0) & (found.straightness[1:] <= 1 + 1e-12)).all()
    assert found.straightness[1] == 1  # a single update is straight
    assert (np.abs(found.cosine[2:]) <= 1).all()
    # Fewer checkpoints see less of the path, and the same displacement.
    (sparse,) = trajectory.trajectories(rows_of(walk(30, seed=seed)[::2], STEPS[::2])).values()
    assert sparse.path[-1] < found.path[-1] and sparse.displacement[-1] == pytest.approx(found.displacement[-1])


def test_a_straight_line_a_turn_and_a_return():
    start, way = np.ones((3, 4)), np.full((3, 4), 0.5)
    straight = trajectory_of([start + time * way for time in (0, 1, 3, 4, 9)])
    assert straight.straightness[1:] == pytest.approx(1) and straight.cosine[2:] == pytest.approx(1)
    back = trajectory_of([start, start + way, start, start + way, start])
    assert back.cosine[2:] == pytest.approx(-1) and back.displacement[-1] == 0 and back.straightness[2] == 0
    still = trajectory_of([start] * 5)
    assert still.path[-1] == 0 and np.isnan(still.straightness[-1]) and np.isnan(still.cosine[-1])


def test_rates_are_summed_over_the_updates_between_two_checkpoints(tmp_path):
    series = write_series(tmp_path / "known", {10: parameters(0), 60: parameters(1)})
    schedule = WSD(SCHEDULE["warmup"], SCHEDULE["stable"], SCHEDULE["decay"])
    expected = [0.01 * sum(schedule.factor(step) for step in range(a + 1, b + 1)) for a, b in ((10, 45), (45, 60))]
    assert trajectory.summed_rates(series, [10, 45, 60])[1:] == pytest.approx(expected)
    lines = Lines(series.path / "metrics.jsonl")
    for step in range(1, 61):
        lines.append({"step": step, "learning_rate": step / 1000})
    lines.close()
    found = trajectory.summed_rates(series, [10, 45, 60])
    assert np.isnan(found[0]) and found[1:] == pytest.approx([sum(range(11, 46)) / 1000, sum(range(46, 61)) / 1000])
    unknown = write_series(tmp_path / "unknown", {10: parameters(0), 60: parameters(1)}, known=False)
    assert trajectory.summed_rates(unknown, [10, 60]) is None


def test_groups_of_tokens_go_from_rare_to_frequent_with_as_many_in_each():
    counts = np.random.default_rng(0).permutation(np.r_[np.zeros(5, int), np.arange(1, 41)])
    groups = trajectory.frequency_groups(counts, 4)
    assert (groups == 0).tolist() == (counts == 0).tolist()
    assert np.bincount(groups).tolist() == [5, 10, 10, 10, 10]
    for rare, frequent in itertools.pairwise(range(1, 5)):
        assert counts[groups == rare].max() < counts[groups == frequent].min()
    assert trajectory.frequency_groups(np.zeros(3, int), 4).tolist() == [0, 0, 0]


@pytest.mark.parametrize("block", [2**22, 50])
def test_norms_of_embeddings_are_means_over_their_groups(monkeypatch, block):
    monkeypatch.setattr(trajectory, "_BLOCK", block)
    embedding = parameters(0)["embedding"]
    groups = np.arange(MODEL["vocabulary"]) % 3
    expected = [np.linalg.norm(embedding[groups == group], axis=1).mean() for group in range(3)]
    assert trajectory.embedding_norms(embedding, groups) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(trajectory.embedding_norms(embedding, groups + 1)[0])  # a group without tokens
