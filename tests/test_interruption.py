"""A run that is interrupted at any moment ends bit-equal to one that is not, with no line lost or doubled."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import jobs
import pytest

from cpmjax.run.interrupt import SAVED_AND_STOPPED

pytestmark = pytest.mark.slow

STEPS = 32  # of jobs.experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    jobs.train(jobs.experiment(folder, "uninterrupted"))
    return folder / "uninterrupted"


@pytest.fixture(scope="module")
def expected(uninterrupted: Path) -> dict[str, str | bytes]:
    return jobs.outcome(uninterrupted)


def test_uninterrupted_is_what_the_experiment_says(uninterrupted: Path) -> None:
    records = jobs.records(uninterrupted)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["stage"] for record in records] == ["warmup"] * 5 + ["stable"] * 20 + ["decay"] * 7
    assert jobs.steps_of(uninterrupted) == [5, 10, 15, 20, 25, 30, 32]
    evaluated = [record["step"] for record in records if "heldout_loss" in record]
    assert evaluated == [5, 10, 15, 20, 25, 30, 32]
    assert records[-1]["loss"] < records[0]["loss"] - 1


def test_killed_again_and_again(folder: Path, uninterrupted: Path, expected: dict[str, str | bytes]) -> None:
    run, cache = folder / "killed", folder / "killed-cache"
    arguments = (folder / "uninterrupted.yaml", f"--run.directory={run}", f"--run.cache={cache}")
    anywhere = random.Random(1).choice([21, 22, 23, 24])
    moments = {
        "while a store is built": lambda: any((cache / "tokens").glob("*.building")),
        "while compiling": lambda: len([*(cache / "tokens").glob("*/store.json")]) == 2,
        "as soon as there is a run": lambda: (run / "config.yaml").exists(),
        "during the first save": lambda: (run / "checkpoints" / "5.orbax-checkpoint-tmp").exists(),
        # The evaluated line 10 is written, its checkpoint is not.
        "between a line and its checkpoint": lambda: jobs.lines_of(run) >= 10 and 10 not in jobs.steps_of(run),
        # Checkpoint 15 is committed; what follows it may be written or not.
        "after a commit": lambda: 15 in jobs.steps_of(run),
        "between two checkpoints": lambda: jobs.lines_of(run) >= anywhere,
        "during a save in the decay": lambda: (run / "checkpoints" / "30.orbax-checkpoint-tmp").exists(),
    }
    for name, moment in moments.items():
        process = jobs.start(*arguments)
        assert jobs.signal_at(process, moment, signal.SIGKILL), (name, jobs.finish(process))
        jobs.finish(process)
        assert jobs.unequal(jobs.outcome(run), expected, finished=False) == [], name
    jobs.train(*arguments)
    assert jobs.unequal(jobs.outcome(run), expected) == []
    assert not list(cache.rglob("*.building")) and not list(run.rglob("*tmp*")) and not list(run.rglob("*.partial"))


def test_sigterm_saves_and_the_same_command_goes_on(folder: Path, expected: dict[str, str | bytes]) -> None:
    run = folder / "stopped"
    arguments = (folder / "uninterrupted.yaml", f"--run.directory={run}")
    process = jobs.start(*arguments)
    assert jobs.signal_at(process, lambda: jobs.lines_of(run) >= 11, signal.SIGTERM)
    code, stderr = jobs.finish(process)
    assert code == SAVED_AND_STOPPED == 75, stderr

    step = jobs.steps_of(run)[-1]
    assert 11 < step < STEPS
    assert jobs.records(run)[-1]["step"] == step
    assert stderr.splitlines()[-1] == f"SIGTERM: saved step {step} of {STEPS}; the same command goes on from there"

    jobs.train(*arguments)
    extra = {piece: value for piece, value in jobs.outcome(run).items() if piece.startswith(f"{step} ")}
    assert extra
    assert jobs.unequal(jobs.outcome(run), expected | extra) == []


def test_a_second_process_is_refused(folder: Path, expected: dict[str, str | bytes]) -> None:
    run = folder / "shared"
    arguments = (folder / "uninterrupted.yaml", f"--run.directory={run}")
    first = jobs.start(*arguments)
    try:
        assert jobs.signal_at(first, lambda: jobs.lines_of(run) >= 1, signal.SIGSTOP)
        assert jobs.refusal(*arguments) == f"{run}: another process is writing this run; expected to be alone"
    finally:
        first.send_signal(signal.SIGCONT)
        code, stderr = jobs.finish(first)
    assert code == 0, stderr
    assert jobs.unequal(jobs.outcome(run), expected) == []


def test_a_finished_run_is_left_alone(folder: Path, uninterrupted: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}

    before = contents()
    stderr = jobs.train(folder / "uninterrupted.yaml")
    assert f"{uninterrupted} is complete: step {STEPS} of {STEPS}" in stderr
    assert contents() == before


def test_a_changed_key_is_refused_until_it_is_accepted(folder: Path, uninterrupted: Path) -> None:
    arguments = (folder / "uninterrupted.yaml", "--schedule.decay=9", "--optimizer.beta2=0.99")
    assert jobs.refusal(*arguments) == (
        f"{uninterrupted} was made with another configuration: optimizer.beta2: 0.95 -> 0.99, schedule.decay: 7 -> 9; "
        "expected the same, or --run.accept_changes=[optimizer.beta2,schedule.decay] if that is meant"
    )
    before = jobs.records(uninterrupted)
    # beta2 is only half of it; a section covers its keys.
    assert "schedule.decay: 7 -> 9" in jobs.refusal(*arguments, "--run.accept_changes=[optimizer]")
    stderr = jobs.train(*arguments, "--run.accept_changes=[optimizer,schedule.decay]")
    assert "changed: schedule.decay: 7 -> 9" in stderr.splitlines()
    assert jobs.records(uninterrupted)[:STEPS] == before
    assert [record["step"] for record in jobs.records(uninterrupted)] == list(range(1, STEPS + 3))
    changes = json.loads((uninterrupted / "provenance.json").read_text())["changes"]
    assert [change["keys"] for change in changes] == [{"optimizer.beta2": [0.95, 0.99], "schedule.decay": [7, 9]}]
