"""A study series made once for all tests of a session, and an imported history."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from formats.conversions import KEYS, SHARED

from cpmjax.convert import convert

ROOT = Path(__file__).parents[1]
HISTORY = SHARED / "minicpm-tiny-history"  # six checkpoints
STEPS, EARLY, LATE = 60, 48, 54  # the whole length, and where its two decays begin
# experiments/study.yaml, but small: its corpora, its mixtures and its members.
SMALL = (
    "--model.vocabulary=512",
    "--model.width=32",
    "--model.layers=2",
    "--model.heads=2",
    "--model.feed_forward=80",
    "--model.dim_model_base=32",
    "--data.sequence_length=128",
    "--schedule.warmup=6",
    "--schedule.stable=48",
    "--schedule.decay=6",
    "--checkpoint.every=6",
    "--checkpoint.every_in_decay=2",
    "--evaluation.every=30",
    "--evaluation.rows=8",
    "--evaluation.sample_tokens=8",
)


def command(directory: Path, *more: str) -> list[str]:
    """The study that makes the small series."""
    cache = f"--run.cache={directory.parent / 'cache'}"
    experiment = str(ROOT / "experiments" / "study.yaml")
    study = [sys.executable, "-m", "cpmjax.study", "series", experiment]
    return [*study, f"--run.directory={directory}", cache, *SMALL, *more]


def environment() -> dict[str, str]:
    return os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}


def small_series(factory: pytest.TempPathFactory) -> Path:
    """The folder of the small series; the first of the processes of a session to ask for it makes it."""
    base = factory.getbasetemp()  # of this process, if there are several
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small_series"
    common.mkdir(exist_ok=True)
    with open(common / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (common / "study" / "series.csv").exists():
            subprocess.run(command(common / "study"), env=environment(), check=True, capture_output=True)
    return common / "study"


def imported_history(folder: Path) -> Path:
    """The small history as a run; skips the test where it is not beside the project."""
    if not HISTORY.is_dir():
        pytest.skip("the small history of six checkpoints is not beside the project")
    run = folder / "history"
    if not run.exists():
        assert convert(HISTORY, run, "run", keys=list(KEYS)) == []
    return run
