"""The atlas: streamed as in memory, after a kill as without one, and only of the series it was begun with."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from analysis.synthetic import MODEL, parameters, write_series
from formats.conversions import HISTORY, KEYS, SHARED, converted, needs_shared

from cpmjax.analysis import atlas, spectra
from cpmjax.analysis.trajectory import trajectories
from cpmjax.checkpoint.series import Series
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError

STEPS = [10, 30, 40, 60]
LAYERS = [1]


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return write_series(folder / "run", {step: parameters(step) for step in STEPS})


@pytest.fixture(scope="module")
def rows(series):
    return atlas.measure(series, STEPS, LAYERS)


def place(row):
    return row["path"], row.get("layer"), row.get("head")


def test_every_slice_has_a_row_at_every_step(series, rows):
    slices = [(path, layer, None) for path, layer in series.weights(10).slices()]
    heads = [(path, 1, head) for path in ("qk", "ov") for head in range(MODEL["heads"])]
    found = [(place(row), row["step"]) for row in rows]
    assert sorted(found, key=str) == sorted(itertools.product(slices + heads, STEPS), key=str)
    for row in rows:
        chosen = row.get("layer") in (*LAYERS, None) and "norm" not in row["path"].split("/")[-1]
        assert ("effective_rank" in row) == chosen
        assert ("update_effective_rank" in row) == (chosen and row["step"] != 10 and "head" not in row)


def test_streamed_numbers_are_those_of_whole_trees_in_memory(series, rows):
    trees = [series.parameters(step) for step in STEPS]
    norms = [np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in leaves(tree))) for tree in trees]
    updates = [
        np.sqrt(
            sum(((np.float64(a) - np.float64(b)) ** 2).sum() for a, b in zip(leaves(new), leaves(old), strict=True))
        )
        for old, new in itertools.pairwise(trees)
    ]
    whole = trajectories(row for row in rows if "head" not in row)["all"]
    assert whole.norm == pytest.approx(norms) and whole.update[1:] == pytest.approx(updates)

    one, two, four = (np.float64(tree["layers"]["down"][1]) for tree in (trees[0], trees[2], trees[3]))
    (found,) = (row for row in rows if place(row) == ("layers/down", 1, None) and row["step"] == 60)
    bases = [np.linalg.svd(weights) for weights in (one, two, four)]
    k = atlas.DIRECTIONS
    assert found["largest_singular_value"] == pytest.approx(bases[2][1][0])
    assert found["effective_rank"] == pytest.approx(spectra.effective_rank(bases[2][1]))
    assert found["mup_norm"] == pytest.approx(bases[2][1][0] / np.sqrt(16 / 24))
    update = np.linalg.svd(four - two)[1]
    assert found["update_stable_rank"] == pytest.approx((update**2).sum() / update[0] ** 2)
    for name, (u, _, _) in (("", bases[1]), ("first_", bases[0])):
        assert found[f"{name}input_overlap"] == pytest.approx((((bases[2][0][:, :k]).T @ u[:, :k]) ** 2).sum() / k)


def leaves(tree):
    return [np.asarray(leaf) for leaf in (*tree["layers"].values(), tree["embedding"], tree["final_norm"])]


def test_what_is_written_is_what_is_measured(series, rows, tmp_path):
    told = []
    assert atlas.run_atlas(series, STEPS, LAYERS, tmp_path, lambda *at: told.append(at)) == rows
    assert atlas.read_atlas(tmp_path) == rows
    assert told[0][0] == 0 and [done for done, _ in told] == list(range(told[-1][1] + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "atlas.csv", "ledger.jsonl"]


class Killed(BaseException):
    """As a kill: nothing catches it."""


@pytest.mark.parametrize("at", [0, 1, 17, 60])
def test_a_killed_atlas_goes_on_and_does_nothing_twice(series, rows, tmp_path, at, monkeypatch):
    def kill(done, total):
        if done == at:
            raise Killed

    with pytest.raises(Killed):
        atlas.run_atlas(series, STEPS, LAYERS, tmp_path, kill)
    ledger = tmp_path / "ledger.jsonl"
    with ledger.open("ab") as file:
        file.write(b'{"unit": "half a li')
    measured = count_moves(monkeypatch)
    assert atlas.run_atlas(series, STEPS, LAYERS, tmp_path) == rows == atlas.read_atlas(tmp_path)
    slices = sum("head" not in row for row in rows)
    assert len(measured) == slices - min(at, slices)
    units = [line["unit"] for line in Lines.read(ledger)[1:]]
    assert len(units) == len(set(units))


def count_moves(monkeypatch):
    """A list that grows with every slice that is measured."""
    measured, moves = [], atlas.moves
    monkeypatch.setattr(atlas, "moves", lambda *arrays: measured.append(1) or moves(*arrays))
    return measured


def test_more_steps_at_the_end_cost_only_what_is_new(series, rows, tmp_path, monkeypatch):
    atlas.run_atlas(series, STEPS[:3], LAYERS, tmp_path)
    measured = count_moves(monkeypatch)
    assert atlas.run_atlas(series, STEPS, LAYERS, tmp_path) == rows
    assert len(measured) == sum(row["step"] == 60 and "head" not in row for row in rows)
    # Other checkpoints between change what an update is: nothing old is taken for it.
    assert atlas.run_atlas(series, [10, 60], [], tmp_path) == atlas.measure(series, [10, 60], [])
    assert {row["step"] for row in atlas.read_atlas(tmp_path)} == {10, 60}


def test_the_atlas_of_another_series_is_refused(series, tmp_path):
    atlas.run_atlas(series, [10], [], tmp_path / "atlas")
    other = write_series(tmp_path / "run", {10: parameters(7)})
    (provenance := other.path / "provenance.json").write_text(
        provenance.read_text().replace('"created": "2', '"created": "1')
    )
    with pytest.raises(UserError, match=r"ledger.jsonl: is of another series; expected one of .*run"):
        atlas.run_atlas(Series(other.path), [10], [], tmp_path / "atlas")
    shutil.copytree(series.path, tmp_path / "copy")
    atlas.run_atlas(Series(tmp_path / "copy"), [10], [], tmp_path / "atlas")  # the same one, elsewhere


def test_what_is_not_there_is_refused(series, tmp_path):
    with pytest.raises(UserError, match=r"layers: .* has layers 0 to 1, not 2"):
        atlas.measure(series, STEPS, [0, 2])
    with pytest.raises(UserError, match=r"no checkpoint of step 11"):
        atlas.measure(series, [10, 11], [])
    with pytest.raises(UserError, match=r"atlas.csv: there is no such table"):
        atlas.read_atlas(tmp_path)


def imported(source, folder):
    converted(source, folder, "--to=run", *KEYS)
    return Series(folder)


def test_an_imported_history(tmp_path):
    check_import(imported(HISTORY, tmp_path / "run"), 2)


@needs_shared
def test_the_whole_imported_history(tmp_path):
    check_import(imported(SHARED / "minicpm-tiny-history", tmp_path / "run"), 6)


def check_import(series, count):
    rows = atlas.measure(series, series.steps, [0])
    whole = trajectories(row for row in rows if "head" not in row)["all"]
    assert whole.steps.tolist() == series.steps and len(series.steps) == count
    assert (whole.straightness[1:] <= 1 + 1e-12).all() and whole.straightness[1] == 1
    ranks = [row[name] for row in rows for name in ("stable_rank", "effective_rank") if name in row]
    assert min(ranks) >= 1 and max(ranks) < series.config.model.width
