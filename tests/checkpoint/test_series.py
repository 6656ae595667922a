"""`cpmjax.Series`: lines of descent, what is known of each step, and what is said when something is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
from small_series import HISTORY, imported_history

import cpmjax
from cpmjax.convert import convert
from cpmjax.model.parameters import flat
from cpmjax.run.errors import UserError
from cpmjax.train import main


def train(experiment: Path, *arguments: str) -> None:
    cache = jax.config.values["jax_compilation_cache_dir"]
    try:
        assert main([str(experiment), *arguments]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """runs/trunk: 20 steps, stable to the end; runs/decay leaves it at 10, runs/tail leaves that at 12; runs/alone."""
    folder = tmp_path_factory.mktemp("series")
    trunk = jobs.experiment(
        folder,
        "runs/trunk",
        schedule={"type": "wsd", "warmup": 5, "stable": 15, "decay": 0},
        evaluation={"every": 100, "rows": 4},
    )
    train(trunk)
    branch = jobs.experiment(
        folder,
        "runs/decay",
        schedule={"type": "wsd", "warmup": 5, "stable": 8, "decay": 4},
        branch={"run": str(folder / "runs/trunk"), "step": 10},
        checkpoint={"every": 2},
    )
    train(branch)
    tail = jobs.experiment(
        folder,
        "runs/tail",
        schedule={"type": "wsd", "warmup": 5, "stable": 7, "decay": 2},
        branch={"run": str(folder / "runs/decay"), "step": 12},
        checkpoint={"every": 1},
    )
    train(tail)
    train(jobs.experiment(folder, "runs/alone", schedule={"type": "wsd", "warmup": 2, "stable": 3, "decay": 0}))
    return folder / "runs"


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 320, (3, 33)).astype(np.int32)
    places = np.tile(np.arange(32, dtype=np.int32), (3, 1))
    weights = draw.integers(0, 2, (3, 32)).astype(np.float32)
    segments = np.ones((3, 32), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places, "segments": segments} | {
        "weights": weights
    }


def loss_by_hand(run: Path, step: int) -> float:
    """From the logits of the loaded model, in float64."""
    rows = batch()
    logits = np.asarray(cpmjax.load(run, step)(rows["tokens"]), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, rows["targets"][..., None], -1)[..., 0]
    losses = np.log(np.exp(shifted).sum(-1)) - chosen
    return float((losses * rows["weights"]).sum() / rows["weights"].sum())


def test_a_trunk(folder):
    series = cpmjax.Series(folder / "trunk")
    assert series.steps == [5, 10, 15, 20] and series.name == "trunk" and series.parent is None
    assert "4 checkpoints, steps 5 to 20" in repr(series)
    lines = {line["step"]: line for line in jobs.records(folder / "trunk")}
    for step in series.steps:
        facts = {
            "stage": series.stage(step),
            "learning_rate": series.learning_rate(step),
            "tokens": series.tokens(step),
        }
        assert facts == {key: lines[step][key] for key in facts}
    assert [series.stage(step) for step in series.steps] == ["warmup", "stable", "stable", "stable"]
    assert series.stable() == [10, 15, 20]
    assert [(stage.name, stage.first, stage.last) for stage in series.stages()] == [("warmup", 1, 5), ("stable", 6, 20)]
    assert [record["step"] for record in series.log()] == [*range(1, 21)]


def test_what_a_checkpoint_holds(folder):
    series = cpmjax.Series(folder / "trunk")
    expected = flat(cpmjax.load(folder / "trunk", 15).parameters)
    found = flat(series.parameters(15))
    assert found.keys() == expected.keys()
    slices = dict(series.leaves(15))
    assert len(slices) == 11 and all(array.dtype == np.float32 for array in slices.values())  # one layer, no head
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)
        for layer in range(array.shape[0]) if path.startswith("layers/") else ():
            np.testing.assert_array_equal(slices[f"{path}/{layer}"], array[layer])
    np.testing.assert_array_equal(slices["embedding"], expected["embedding"])

    state = series.optimizer_state(15)
    arrays = jobs.checkpoint_arrays(folder / "trunk", 15)
    stored = {key: array for key, array in arrays.items() if key.startswith("optimizer/")}
    assert {f"optimizer/{path}" for path in flat(state)} == stored.keys()
    for path, array in flat(state).items():
        np.testing.assert_array_equal(array, stored[f"optimizer/{path}"])


@pytest.mark.smoke
def test_the_loss_is_that_of_the_logits(folder):
    series = cpmjax.Series(folder / "trunk")
    for step in (5, 20):
        assert series.loss(step, batch()) == pytest.approx(loss_by_hand(folder / "trunk", step), abs=1e-5)
    average = jax.tree.map(lambda a, b: (a + b) / 2, series.parameters(15), series.parameters(20))
    assert float(series.loss_of(average, batch())) != pytest.approx(series.loss(20, batch()), abs=1e-6)
    np.testing.assert_allclose(series.model(20)(batch()["tokens"]), cpmjax.load(folder / "trunk")(batch()["tokens"]))


def test_a_branch_goes_on_where_it_left_its_trunk(folder):
    series = cpmjax.Series(folder / "decay")
    assert series.steps == [5, 10, 12, 13, 14, 16, 17] and series.branch_step == 10
    assert [series.stage(step) for step in series.steps] == ["warmup", *["stable"] * 3, *["decay"] * 3]
    assert [record["step"] for record in series.log()] == [*range(1, 18)]
    trunk = cpmjax.Series(folder / "trunk")
    for path, array in flat(series.parameters(10)).items():
        np.testing.assert_array_equal(array, flat(trunk.parameters(10))[path])
    # The line of descent is not the trunk's beyond the branch point.
    with pytest.raises(UserError, match=r"decay has no checkpoint of step 15: expected one of 5, 10, 12"):
        series.parameters(15)


def test_children_are_found_by_where_they_say_they_are_from(folder):
    trunk = cpmjax.Series(folder / "trunk")
    assert [*trunk.branches()] == ["decay"] and [*trunk.decays()] == ["decay"]
    (tail,) = trunk.branches()["decay"].branches().values()
    assert tail.steps == [5, 10, 12, 13, 14] and [*tail.decays()] == ["tail"]
    assert cpmjax.Series(folder / "alone").branches() == cpmjax.Series(folder / "alone").decays() == {}


def test_a_folder_of_runs_is_its_trunk_wherever_it_lies(folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    trunk = cpmjax.Series(moved)
    assert trunk.path == moved / "trunk"
    (decay,) = trunk.branches().values()
    assert decay.path == moved / "decay" and decay.parent.path == moved / "trunk"
    assert cpmjax.Series(moved / "tail").parent.parent.path == moved / "trunk"


def test_a_parent_that_is_gone_is_left_out(folder, tmp_path):
    shutil.copytree(folder / "decay", tmp_path / "decay")
    file = tmp_path / "decay" / "provenance.json"
    provenance = json.loads(file.read_text())
    provenance["parent"]["run"] = str(tmp_path / "trunk")
    file.write_text(json.dumps(provenance))
    assert cpmjax.Series(tmp_path / "decay").steps == [12, 13, 14, 16, 17]


def test_another_run_of_the_same_name_is_no_parent(folder, tmp_path):
    shutil.copytree(folder / "decay", tmp_path / "decay")
    shutil.copytree(folder / "alone", tmp_path / "trunk")
    assert cpmjax.Series(tmp_path / "decay").parent.path == folder / "trunk"
    assert cpmjax.Series(tmp_path / "trunk").branches() == {}


def test_an_import(tmp_path):
    series = cpmjax.Series(imported_history(tmp_path))
    assert series.steps == [60000, 120000, 180000, 300000, 330000, 390000]
    assert series.stable() == [60000, 120000, 180000, 300000] and [*series.decays()] == ["history"]
    assert series.learning_rate(330000) == pytest.approx(0.01 / 4) and series.tokens(60000) == 60000 * 8 * 128
    assert series.log() == [] and series.optimizer_state(300000) is None and series.branches() == {}


def test_an_import_of_which_nobody_knows_the_schedule(tmp_path):
    if not HISTORY.is_dir():
        pytest.skip("the small history of six checkpoints is not beside the project")
    assert convert(HISTORY, tmp_path / "run", "run") == []
    series = cpmjax.Series(tmp_path / "run")
    assert {series.stage(step) for step in series.steps} == {"imported"} and series.stages() == []
    assert series.learning_rate(60000) is series.tokens(60000) is None
    assert series.stable() == series.steps and series.decays() == {}


def test_what_is_missing_or_damaged_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"nothing is not a run directory: there is no .*config\.yaml"):
        cpmjax.Series(tmp_path / "nothing")
    empty = tmp_path / "empty"
    shutil.copytree(folder / "alone", empty)
    shutil.rmtree(empty / "checkpoints")
    (empty / "checkpoints").mkdir()
    with pytest.raises(UserError, match="empty has no checkpoint yet"):
        cpmjax.Series(empty)

    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "trunk", damaged)
    for file in (damaged / "checkpoints" / "15" / "parameters").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    series = cpmjax.Series(damaged)
    assert series.loss(10, batch()) == pytest.approx(loss_by_hand(folder / "trunk", 10), abs=1e-5)
    for read in (series.parameters, lambda step: dict(series.leaves(step)), lambda step: series.loss(step, batch())):
        with pytest.raises(UserError, match=r"checkpoints/15.*cannot be restored") as raised:
            read(15)
        assert len(str(raised.value).splitlines()) == 1
