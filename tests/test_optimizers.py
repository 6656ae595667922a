"""Runs with other optimizers: bit-equal when resumed, averages saved and loaded, branches with another optimizer."""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path

import jobs
import numpy as np
import pytest

import cpmjax
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.run.errors import UserError

pytestmark = pytest.mark.slow

RUNS = {
    "muon": {
        "optimizer": {"type": "muon", "state_dtype": "bfloat16"},
        "training": {"ema": 0.9},
        "checkpoint": {"every": 1},
    },
    "schedule_free": {"optimizer": {"type": "schedule_free"}},
    "offloaded": {"optimizer": {"type": "adamw", "state_dtype": "int8", "offload": True}, "training": {"ema": 0.9}},
    "plain": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    for name, sections in RUNS.items():
        jobs.train(jobs.experiment(folder, f"optimizers_{name}", **sections))
    return {name: folder / f"optimizers_{name}" for name in RUNS}


@pytest.mark.parametrize("name", ["muon", "schedule_free", "offloaded"])
def test_a_killed_run_ends_as_one_that_was_not(folder: Path, runs: dict[str, Path], name: str) -> None:
    run = folder / f"optimizers_{name}_killed"
    arguments = (folder / f"optimizers_{name}.yaml", f"--run.directory={run}")
    process = jobs.start(*arguments)
    assert jobs.signal_at(process, lambda: jobs.lines_of(run) >= 12, signal.SIGKILL)
    jobs.finish(process)
    assert jobs.steps_of(run)[-1] < 32
    jobs.train(*arguments)
    expected = jobs.outcome(runs[name])
    assert any("average/" in piece for piece in expected)
    assert jobs.unequal(jobs.outcome(run), expected) == []


def parameters_of(run: Path, step: int, item: str = "parameters") -> np.ndarray:
    """Of the embedding, which stands for all."""
    return np.asarray(jobs.checkpoint_arrays(run, step)[f"{item}/embedding"], np.float64)


def test_the_average_is_that_of_the_parameters_after_each_update(runs: dict[str, Path]) -> None:
    weights = 0.9 ** np.arange(31, -1, -1.0)
    mean = sum(w * parameters_of(runs["muon"], step) for step, w in enumerate(weights, 1)) / weights.sum()
    np.testing.assert_allclose(parameters_of(runs["muon"], 32, "average"), mean, atol=1e-6)


def test_that_of_schedule_free_adamw_is_x(runs: dict[str, Path]) -> None:
    """y = 0.1 z + 0.9 x."""
    x, y = (parameters_of(runs["schedule_free"], 32, item) for item in ("average", "parameters"))
    z = jobs.checkpoint_arrays(runs["schedule_free"], 32)["optimizer/1/z/embedding"]
    np.testing.assert_allclose(0.1 * z + 0.9 * x, y, atol=1e-6)
    assert np.abs(x - y).max() > 1e-3


@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_the_average_is_evaluated_beside_the_parameters_and_loads(runs: dict[str, Path], name: str) -> None:
    last = jobs.records(runs[name])[-1]
    assert last["average/heldout_loss"] != last["heldout_loss"]
    for average, item in ((False, "parameters"), (True, "average")):
        loaded = cpmjax.load(runs[name], average=average).parameters
        np.testing.assert_array_equal(np.asarray(loaded["embedding"]), parameters_of(runs[name], 32, item))
    with pytest.raises(UserError, match=r"checkpoints/32 has no average: expected one of a run with training\.ema"):
        cpmjax.load(runs["plain"], average=True)


def test_a_branch_goes_on_with_the_average_of_its_parent(folder: Path, runs: dict[str, Path]) -> None:
    run = folder / "optimizers_branch"
    jobs.train(f"--branch.run={runs['muon']}", "--branch.step=25", f"--run.directory={run}", "--schedule.decay=7")
    found, expected = jobs.checkpoint_arrays(run, 32), jobs.checkpoint_arrays(runs["muon"], 32)
    assert {name: x.tobytes() for name, x in found.items()} == {name: x.tobytes() for name, x in expected.items()}


def test_an_average_may_begin_in_a_branch(folder: Path, runs: dict[str, Path]) -> None:
    run = folder / "optimizers_average"
    branch = (f"--branch.run={runs['plain']}", "--branch.step=25", f"--run.directory={run}", "--schedule.decay=7")
    jobs.train(*branch, "--training.ema=0.5")
    with contextlib.closing(Checkpoints(run / "checkpoints")) as store:
        assert store.position(32)["averaged"] == 7
    np.testing.assert_array_equal(
        jobs.checkpoint_arrays(run, 32)["parameters/embedding"],
        jobs.checkpoint_arrays(runs["plain"], 32)["parameters/embedding"],
    )


def test_a_branch_with_another_optimizer_has_new_moments(folder: Path, runs: dict[str, Path]) -> None:
    run = folder / "optimizers_lion"
    branch = (f"--branch.run={runs['plain']}", "--branch.step=25", f"--run.directory={run}", "--schedule.decay=7")
    said = jobs.train(*branch, "--optimizer.type=lion")
    assert "fresh moments, rate warmed up again over 100 steps" in said
    assert json.loads((run / "provenance.json").read_text())["parent"]["moments"] == "fresh"
    # And once it has checkpoints of its own, it goes on with its own moments.
    assert jobs.checkpoint_arrays(run, 32)["optimizer/1/count"] == 7
    refusal = jobs.refusal(folder / "optimizers_plain.yaml", "--optimizer.type=lion")
    assert refusal.startswith(f"{runs['plain']} was made with optimizer.type=adamw; expected the same")
    flags = ("--optimizer.state_dtype=int8", "--run.accept_changes=[optimizer]")
    refusal = jobs.refusal(folder / "optimizers_plain.yaml", *flags)
    assert refusal.startswith(f"{runs['plain']} was made with optimizer.state_dtype=float32; expected the same")


def test_the_type_of_the_state_may_change_and_is_converted(folder: Path, runs: dict[str, Path]) -> None:
    run = folder / "optimizers_converted"
    branch = (f"--branch.run={runs['plain']}", "--branch.step=25", f"--run.directory={run}", "--schedule.decay=7")
    said = jobs.train(*branch, "--optimizer.state_dtype=bfloat16")
    assert "restored moments" in said
    found, expected = jobs.records(run), jobs.records(runs["plain"])[25:]
    # The first loss is that of the same parameters; the next ones see moments rounded to 8 bits.
    assert found[0]["loss"] == expected[0]["loss"]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], atol=0.02)
    assert jobs.checkpoint_arrays(run, 32)["optimizer/1/nu/embedding"].dtype == "bfloat16"
