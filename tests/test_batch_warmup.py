"""A run whose batch grows from 2 rows to 4 after step 12: against runs of one size, interrupted, and branched."""

from __future__ import annotations

import signal
from pathlib import Path

import jobs
import pytest

from cpmjax.run.interrupt import SAVED_AND_STOPPED

pytestmark = pytest.mark.slow

DECAY, CHANGE = 7, 12
GROWS = f"--training.batch_warmup=[[2,{CHANGE}]]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


def trained(folder: Path, name: str, *keys: str, **sections: dict) -> Path:
    sections = {"checkpoint": {"every": 5, "steps": [CHANGE]}} | sections
    jobs.train(jobs.experiment(folder, name, **sections), *keys)
    return folder / name


@pytest.fixture(scope="module")
def grown(folder: Path) -> Path:
    return trained(folder, "grown", GROWS)


def after(run: Path, step: int) -> list[dict]:
    return [record for record in jobs.records(run) if record["step"] > step]


def test_it_is_a_run_of_small_batches_that_a_branch_of_large_ones_continues(folder: Path, grown: Path) -> None:
    """Equal losses are equal rows: those that the small run would read next."""
    small = trained(folder, "small", training={"batch_size": 2})
    for found, expected in zip(jobs.records(grown)[:CHANGE], jobs.records(small)[:CHANGE], strict=True):
        # Held-out rows are evaluated four at a time here and two at a time there: equal but for the last bits.
        assert found == {
            key: pytest.approx(value, abs=1e-5) if key.startswith(("heldout", "bits_per_byte")) else value
            for key, value in expected.items()
        }
    large = folder / "large"
    branch = (f"--branch.run={small}", f"--branch.step={CHANGE}", f"--run.directory={large}")
    jobs.train(*branch, "--training.batch_size=4", "--schedule.stable=20")
    assert after(large, 0) == after(grown, CHANGE) and after(large, 0)
    found, expected = jobs.checkpoint_arrays(large, 32), jobs.checkpoint_arrays(grown, 32)
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


def test_tokens_count_the_rows_of_each_step(folder: Path, grown: Path) -> None:
    assert [record["tokens"] for record in jobs.records(grown)] == [
        32 * (2 * min(step, CHANGE) + 4 * max(0, step - CHANGE)) for step in range(1, 33)
    ]
    assert jobs.outcome(grown)["32 position"] == '{"sequences": 104, "skipped": 0}'
    in_tokens = {"unit": "tokens", "warmup": 5 * 64, "stable": 7 * 64 + 13 * 128, "decay": DECAY * 128}
    same = trained(folder, "grown_tokens", f"--training.batch_warmup=[[2,{CHANGE * 64}]]", schedule=in_tokens)
    assert jobs.unequal(jobs.outcome(same), jobs.outcome(grown)) == []


def test_a_warmup_of_equal_batches_is_none(folder: Path) -> None:
    plain = trained(folder, "plain")
    equal = trained(folder, "equal", "--training.batch_warmup=[[4,6],[4,9]]")
    assert jobs.unequal(jobs.outcome(equal), jobs.outcome(plain)) == []


@pytest.mark.parametrize("lines", [7, 17])  # while batches are small, and when they have grown
def test_an_interrupted_run_ends_as_one_that_was_not(folder: Path, grown: Path, lines: int) -> None:
    run = folder / f"interrupted{lines}"
    arguments = (folder / "grown.yaml", GROWS, f"--run.directory={run}")
    process = jobs.start(*arguments)
    assert jobs.signal_at(process, lambda: jobs.lines_of(run) >= lines, signal.SIGTERM)
    code, stderr = jobs.finish(process)
    assert code == SAVED_AND_STOPPED, stderr
    stderr = jobs.train(*arguments)
    # Both programs, with the memory that they take, come before the first step.
    assert stderr.index("2 rows a step: compiled") < stderr.index("4 rows a step: compiled") < stderr.index("; step ")
    reference = jobs.outcome(grown)
    found = {key: value for key, value in jobs.outcome(run).items() if key in reference}
    assert jobs.unequal(found, reference) == []


@pytest.mark.parametrize("step", [10, 20])  # from before the change, which falls into the decay, and from after it
def test_a_branch_is_the_run_that_had_its_schedule_from_the_start(folder: Path, grown: Path, step: int) -> None:
    branch = folder / f"grown_b{step}"
    jobs.train(f"--branch.run={grown}", f"--branch.step={step}", f"--run.directory={branch}")
    reference = trained(folder, f"grown_{step}", GROWS, schedule={"stable": step - 5})
    assert after(branch, 0) == after(reference, step) and after(branch, 0)[-1]["step"] == step + DECAY
    last = step + DECAY
    found, expected = jobs.checkpoint_arrays(branch, last), jobs.checkpoint_arrays(reference, last)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_a_resumed_run_may_not_change_it_unasked(folder: Path, grown: Path) -> None:
    message = jobs.refusal(folder / "grown.yaml", "--training.batch_warmup=[[2,13]]")
    assert "training.batch_warmup: [[2, 12]] -> [[2, 13]]" in message
