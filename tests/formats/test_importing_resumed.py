"""An import that is interrupted goes on by the same command, and ends as if it had not been; another is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import jobs
import pytest
from formats.conversions import (
    GOLDEN,
    HISTORY,
    KEYS,
    SHARED,
    checkpoints,
    converted,
    finish,
    flip,
    kill,
    left_in,
    needs_shared,
    outcome,
    refused,
    start,
)

SIX = SHARED / "minicpm-tiny-history"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the two checkpoints."""
    run = tmp_path_factory.mktemp("two") / "run"
    converted(HISTORY, run, "--to=run", *KEYS)
    return run


def test_what_is_imported_is_left_alone(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    stderr = converted(HISTORY, run, "--to=run", *KEYS)
    assert stderr.count("is imported already") == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_steps_may_come_one_after_the_other(two, tmp_path):
    run = tmp_path / "run"
    converted(HISTORY, run, "--to=run", "--step=390000", *KEYS)
    assert jobs.steps_of(run) == [390_000]
    assert "step 390000: pytorch_model.390000 is imported already" in converted(HISTORY, run, "--to=run", *KEYS)
    assert outcome(run) == outcome(two)


def test_the_source_is_the_same_from_everywhere(two, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    monkeypatch.chdir(HISTORY.parent)
    assert "imported already" in converted(HISTORY.name, run, "--to=run", *KEYS)


def test_a_checkpoint_without_its_line_was_not_verified(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    provenance = json.loads((run / "provenance.json").read_text())
    del provenance["checkpoints"]["300000"]
    (run / "provenance.json").write_text(json.dumps(provenance))
    flip(run / "checkpoints" / "300000", largest=True)
    assert checkpoints(run)[300_000] != checkpoints(two)[300_000]
    stderr = converted(HISTORY, run, "--to=run", *KEYS)
    assert stderr.count("is imported already") == 1
    assert checkpoints(run) == checkpoints(two)


def test_changed_keys_are_refused_until_they_are_accepted(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    changed = [*KEYS, "--schedule.half_life=30000"]
    assert refused(HISTORY, run, "--to=run", *changed) == (
        f"{run} was made with another configuration: schedule.half_life: 15000.0 -> 30000.0; "
        "expected the same, or --run.accept_changes=[schedule.half_life] if that is meant"
    )
    stderr = converted(HISTORY, run, "--to=run", *changed, "--run.accept_changes=[schedule.half_life]")
    # Only the decay is another one.
    assert "step 300000: pytorch_model.300000 is imported already" in stderr and stderr.count("already") == 1
    rates = {step: found["metadata"]["learning_rate"] for step, found in checkpoints(run).items()}
    assert rates == {300_000: 0.01, 390_000: pytest.approx(0.01 * 0.5**3)}


def test_places_that_hold_something_else(two, tmp_path):
    run, other = tmp_path / "run", GOLDEN / "minicpm-tiny-gqa"
    shutil.copytree(two, run)
    assert refused(other, run, "--to=run", *KEYS, "--step=1") == (
        f"{run} holds an import of {HISTORY} already; expected a new directory for {other}"
    )
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(provenance | {"kind": "trained"}))
    assert refused(HISTORY, run, "--to=run", *KEYS) == (
        f"{run} holds a run already; expected a new directory for {HISTORY}"
    )
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("a year of work")
    assert "is not a run directory: it has chapter1.tex" in refused(HISTORY, thesis, "--to=run", *KEYS)
    assert left_in(thesis) == ["chapter1.tex"]
    assert "it is a file" in refused(HISTORY, thesis / "chapter1.tex", "--to=run", *KEYS)
    assert refused(two, tmp_path / "again", "--to=run") == f"{two}: a run already; expected --to hf, llama or gguf"
    assert left_in(tmp_path) == ["run", "thesis"]


@pytest.mark.slow
def test_two_writers_at_once(two, tmp_path):
    run = tmp_path / "run"
    first = start(tmp_path / "log", HISTORY, run, "--to=run", *KEYS, pause=0.01)
    try:
        while not (run / "config.yaml").exists() and first.is_alive():
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)
        assert refused(HISTORY, run, "--to=run", *KEYS) == (
            f"{run}: another process is writing this run; expected to be alone"
        )
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert finish(first) == 0, (tmp_path / "log").read_text()
    assert outcome(run) == outcome(two)


# A kill at any moment.


@needs_shared
@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """Whatever is complete after a kill is right, and the same command ends as if there had been none."""
    converted(SIX, tmp_path / "whole", "--to=run", *KEYS)
    draw, whole = random.Random(5), outcome(tmp_path / "whole")
    kills, run, log = 0, tmp_path / "run", tmp_path / "log"
    arguments = (SIX, run, "--to=run", *KEYS)
    while kills < 24:
        process = start(log, *arguments, pause=0.002)
        time.sleep(draw.uniform(0.05, 1.0))
        if kill(process):
            kills += 1
            if (run / "config.yaml").exists():
                lines = json.loads((run / "provenance.json").read_text())["checkpoints"]
                found = checkpoints(run) if (run / "checkpoints").exists() else {}
                assert all(found[step] == whole["checkpoints"][step] for step in found)
                assert lines.items() <= whole["lines"].items()
                assert set(map(int, lines)) <= found.keys()
        else:
            assert outcome(run) == whole, log.read_text()
            shutil.rmtree(run)
    converted(*arguments)
    assert outcome(run) == whole
    assert not [*run.rglob("*tmp*"), *run.rglob("*.partial")]
