"""A branch is bit-equal to a run that had its schedule from step 0; what cannot be branched from is refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import jobs
import numpy as np
import pytest

from cpmjax.run.interrupt import SAVED_AND_STOPPED

pytestmark = pytest.mark.slow

WARMUP, STABLE, DECAY, PEAK, FLOOR = 5, 20, 7, 0.01, 0.1
TOKENS_PER_STEP = 4 * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def trunk(folder: Path) -> Path:
    """Checkpoints at 5 (warmup), 10, 15, 20, 25 (stable), 30 and 32 (decay, on another mixture)."""
    jobs.train(jobs.experiment(folder, "trunk"))
    return folder / "trunk"


@pytest.fixture(scope="module")
def from_zero(folder: Path, trunk: Path) -> Path:
    """A run whose decay began after step 15."""
    jobs.train(jobs.experiment(folder, "from_zero", schedule={"stable": 15 - WARMUP}))
    return folder / "from_zero"


@pytest.fixture(scope="module")
def without_moments(folder: Path, trunk: Path) -> Path:
    """The trunk as an imported run would be: step 15 has parameters only."""
    bare = folder / "without_moments"
    shutil.copytree(trunk, bare)
    shutil.rmtree(bare / "checkpoints" / "15" / "optimizer")
    return bare


def branch(parent: Path, step: int, directory: Path) -> tuple[str, ...]:
    return (f"--branch.run={parent}", f"--branch.step={step}", f"--run.directory={directory}")


def assert_continues_as(branch: Path, reference: Path, step: int) -> None:
    """Every line after the step, and the last checkpoint, are the same bit for bit."""
    lines = jobs.records(branch)
    assert lines == [record for record in jobs.records(reference) if record["step"] > step]
    assert lines[0]["step"] == step + 1 and lines[-1]["stage"] == "decay"
    last = lines[-1]["step"]
    assert jobs.steps_of(branch)[-1] == jobs.steps_of(reference)[-1] == last
    found, expected = jobs.checkpoint_arrays(branch, last), jobs.checkpoint_arrays(reference, last)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_branch_is_the_run_that_had_its_schedule_from_the_start(folder: Path, trunk: Path, from_zero: Path) -> None:
    # The decay must tell the mixtures apart, and the trunk must have gone another way.
    assert jobs.records(trunk)[15:22] != jobs.records(from_zero)[15:22]
    jobs.train(*branch(trunk, 15, folder / "b15"), f"--schedule.decay={DECAY}")
    assert_continues_as(folder / "b15", from_zero, 15)

    provenance = json.loads((folder / "b15" / "provenance.json").read_text())
    assert provenance["kind"] == "branch"
    parent = provenance["parent"]
    first_line = (trunk / "config.yaml").read_text().splitlines()[0]
    assert first_line == f"# fingerprint: {parent.pop('fingerprint')}"
    assert parent == {"run": str(trunk), "step": 15, "position": 15 * 4, "moments": "restored", "rewarmup": 0}


def test_the_trunks_own_decay_is_one_of_its_branches(folder: Path, trunk: Path) -> None:
    jobs.train(*branch(trunk, STABLE + WARMUP, folder / "b25"), f"--schedule.decay={DECAY}")
    assert_continues_as(folder / "b25", trunk, STABLE + WARMUP)


def test_lengths_in_tokens(folder: Path, trunk: Path, from_zero: Path) -> None:
    lengths = {"warmup": WARMUP, "stable": STABLE, "decay": DECAY}
    # A boundary inside a step is rounded up to its end.
    tokens = {name: length * TOKENS_PER_STEP for name, length in lengths.items()} | {"warmup": 5 * TOKENS_PER_STEP - 9}
    in_tokens = folder / "in_tokens"
    jobs.train(jobs.experiment(folder, in_tokens.name, schedule={"unit": "tokens", **tokens}))
    assert jobs.unequal(jobs.outcome(in_tokens), jobs.outcome(trunk)) == []
    decay = f"--schedule.decay={DECAY * TOKENS_PER_STEP}"
    jobs.train(*branch(in_tokens, 15, folder / "b15_tokens"), decay)
    assert_continues_as(folder / "b15_tokens", from_zero, 15)


def test_refused(folder: Path, trunk: Path) -> None:
    new = folder / "refused"
    stable = "expected a stable checkpoint: 10, 15, 20, 25"
    decay = "--schedule.decay=3"
    assert (
        jobs.refusal(*branch(trunk, 30, new), decay) == f"branch.step = 30 of {trunk} is in the stage decay; {stable}"
    )
    assert jobs.refusal(*branch(trunk, 5, new), decay) == f"branch.step = 5 of {trunk} is in the stage warmup; {stable}"
    assert jobs.refusal(*branch(trunk, 17, new), decay) == f"branch.step = 17 of {trunk} has no checkpoint; {stable}"
    # A step that is not even the end of the warmup has no schedule to branch.
    assert "branch.step = 3: expected 5, the end of the warmup" in jobs.refusal(*branch(trunk, 3, new), decay)
    changed = jobs.refusal(*branch(trunk, 15, new), "--model.width=32")
    assert changed == f"model.width: expected as in {trunk}, a branch goes on with the same model"
    missing = jobs.refusal(*branch(folder / "nowhere", 15, new))
    assert "branch.run" in missing and f"no {folder / 'nowhere' / 'config.yaml'}" in missing
    assert "expected a directory of its own" in jobs.refusal(*branch(trunk, 15, trunk))
    assert "expected a directory of its own" in jobs.refusal(*branch(trunk, 15, new)[:2])
    # A refusal leaves the place free, and the trunk as it was.
    assert not (new / "config.yaml").exists()
    assert jobs.steps_of(trunk) == [5, 10, 15, 20, 25, 30, 32]


def test_parent_without_moments(folder: Path, without_moments: Path, from_zero: Path) -> None:
    run = folder / "rewarmed"
    stderr = jobs.train(*branch(without_moments, 15, run), f"--schedule.decay={DECAY}")
    assert "fresh moments, rate warmed up again over 100 steps" in stderr
    parent = json.loads((run / "provenance.json").read_text())["parent"]
    assert (parent["moments"], parent["rewarmup"], parent["position"]) == ("fresh", 100, 60)
    rates = [record["learning_rate"] for record in jobs.records(run)]
    decayed = [PEAK * FLOOR ** (done / DECAY) for done in range(1, DECAY + 1)]
    assert rates == pytest.approx([rate * done / 100 for done, rate in enumerate(decayed, 1)], rel=1e-6)
    # The same parameters see the same rows: the first loss is that of the run that kept its moments.
    assert jobs.records(run)[0]["loss"] == jobs.records(from_zero)[15]["loss"]
    assert jobs.records(run)[1]["loss"] != jobs.records(from_zero)[16]["loss"]
    counts = [array for name, array in jobs.checkpoint_arrays(run, 22).items() if name.endswith("count")]
    assert counts and all(count == DECAY for count in counts)


def test_rewarmup_is_a_key_and_survives_a_kill(folder: Path, without_moments: Path) -> None:
    whole, killed = folder / "rewarmed4", folder / "rewarmed4_killed"
    keys = (f"--schedule.decay={DECAY}", "--branch.rewarmup=4")
    jobs.train(*branch(without_moments, 15, whole), *keys)
    rates = [record["learning_rate"] for record in jobs.records(whole)]
    expected = [PEAK * FLOOR ** (done / DECAY) * min(1, done / 4) for done in range(1, DECAY + 1)]
    assert rates == pytest.approx(expected, rel=1e-6)

    process = jobs.start(*branch(without_moments, 15, killed), *keys)
    assert jobs.signal_at(process, lambda: 20 in jobs.steps_of(killed), signal.SIGKILL)
    jobs.finish(process)
    assert jobs.steps_of(killed) == [20]
    jobs.train(*branch(without_moments, 15, killed), *keys)
    assert jobs.unequal(jobs.outcome(killed), jobs.outcome(whole)) == []


def test_goes_on_on_another_number_of_devices(folder: Path, trunk: Path) -> None:
    run = folder / "moved"
    arguments = (folder / "trunk.yaml", f"--run.directory={run}")
    process = jobs.start(*arguments)
    assert jobs.signal_at(process, lambda: jobs.lines_of(run) >= 11, signal.SIGTERM)
    code, stderr = jobs.finish(process)
    assert code == SAVED_AND_STOPPED, stderr
    stopped = jobs.steps_of(run)[-1]
    assert 11 < stopped < 32

    mesh = ("--mesh.fsdp=2", "--mesh.data=-1", "--run.accept_changes=[mesh]")
    stderr = jobs.train(*arguments, *mesh, devices=4)
    assert "4 x cpu" in stderr
    for name in ("loss", "heldout_loss", "heldout/others"):
        one, four = ([record[name] for record in jobs.records(each) if name in record] for each in (trunk, run))
        assert len(one) == len(four)
        np.testing.assert_allclose(four, one, rtol=0, atol=1e-5)
