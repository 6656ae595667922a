"""Conversions for tests: the small history and its expected numbers, and the command, here or in a process to kill."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import jax
import jobs
import numpy as np
import pytest

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.convert import main as convert_job
from cpmjax.formats.loading import load
from cpmjax.run import cli
from cpmjax.run.config import CheckpointConfig
from cpmjax.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "golden"
HISTORY = GOLDEN / "minicpm-tiny-history"  # two checkpoints of the six
BESIDE = ("config.json", "tokenizer.model", "tokenizer_config.json")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the larger golden files are not beside the project")

# How the small history was trained, with its labels (a thousand times the true step) for steps.
KEYS = (
    "--schedule.type=wsd",
    "--schedule.warmup=20000",
    "--schedule.stable=280000",
    "--schedule.decay=90000",
    "--schedule.shape=half_life",
    "--schedule.half_life=15000",
    "--optimizer.learning_rate=0.01",
    "--training.batch_size=8",
    "--data.sequence_length=128",
)


def expected() -> dict[str, np.ndarray]:
    with np.load(HISTORY / "expected.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def copy_history(folder: Path, **places: str) -> Path:
    """A folder with the config and the tokenizer, and the weights of step300000="NAME" at that name."""
    folder.mkdir()
    for name in BESIDE:
        shutil.copy(HISTORY / name, folder)
    for step, place in places.items():
        (folder / place).parent.mkdir(exist_ok=True)
        shutil.copy(HISTORY / f"pytorch_model.{step.removeprefix('step')}", folder / place)
    return folder


def run_with_average(folder: Path) -> Path:
    """The history as a run, and its step 400000: the parameters of 390000, and those of 300000 as their average."""
    converted(HISTORY, folder, "--to=run", *KEYS)
    last, average = (load(HISTORY, step).parameters for step in (390_000, 300_000))
    with contextlib.closing(Checkpoints(folder / "checkpoints", CheckpointConfig())) as store:
        store.save(400_000, last, {"count": np.zeros(())}, {"sequences": 0, "skipped": 0}, {}, average)
        store.wait()
    return folder


def command(*arguments: str | Path) -> tuple[int, str]:
    """`python -m cpmjax.convert` in this process: (exit code, stderr)."""
    argv, stderr = sys.argv, io.StringIO()
    sys.argv = ["convert", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as caught:
            cli.main(convert_job)
    finally:
        sys.argv = argv
    return int(caught.value.code or 0), stderr.getvalue()


def converted(*arguments: str | Path) -> str:
    """Runs a conversion that must end well; returns its stderr."""
    code, stderr = command(*arguments)
    assert code == 0, stderr
    return stderr


def refused(*arguments: str | Path) -> str:
    """The one line, without its `error: `, with which the command must refuse the arguments."""
    return jobs.error_line(*command(*arguments))


# Processes to kill. They are forked from one that has imported everything, so that each takes no time to start.

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["cpmjax.convert", "cpmjax.formats.hub"])


def start(log: Path, *arguments: str | Path, pause: float = 0.0, **environment: str) -> ForkServerProcess:
    """The command in a process whose stderr goes to a file; it waits `pause` seconds with each slice it handles."""
    process = _FORKS.Process(target=_command, args=(log, list(map(str, arguments)), pause, environment))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int:
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill(process: ForkServerProcess) -> bool:
    """Whether it was running until it was killed."""
    process.kill()
    process.join()
    return process.exitcode == -9


def _command(log: Path, arguments: list[str], pause: float, environment: dict[str, str]) -> None:
    os.environ |= environment
    from cpmjax.formats import exporting, importing

    checksum, named_tensors = importing.checksum, exporting.named_tensors

    def slow_checksum(array: np.ndarray) -> int:
        time.sleep(pause)
        return checksum(array)

    def slow_tensors(*arguments: Any) -> Iterator[Any]:
        for each in named_tensors(*arguments):
            time.sleep(pause)
            yield each

    importing.checksum, exporting.named_tensors = slow_checksum, slow_tensors
    sys.argv = ["convert", *arguments]
    with open(log, "w") as file, contextlib.redirect_stderr(file):
        cli.main(convert_job)


# What is there.


def checkpoints(run: Path) -> dict[int, dict[str, Any]]:
    """{step: its metadata, and the bytes and types of its parameters} of a run."""
    found: dict[int, dict[str, Any]] = {}
    with contextlib.closing(Checkpoints(RunDirectory(run).checkpoints)) as store:
        for step in store.steps():
            leaves = jax.tree_util.tree_leaves_with_path(store.parameters(step))
            found[step] = {"metadata": store.metadata(step)} | {
                jax.tree_util.keystr(path): (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in leaves
            }
    return found


def outcome(run: Path) -> dict[str, Any]:
    """All that an import has led to and that comes neither from the clock nor from the command."""
    config = [line for line in (run / "config.yaml").read_text().splitlines() if "directory:" not in line]
    provenance = json.loads((run / "provenance.json").read_text())
    tokenizer = [(run / name).read_bytes() for name in ("tokenizer.model", "tokenizer.json")]
    return {
        "config": config,
        "lines": provenance["checkpoints"],
        "tokenizer": tokenizer,
        "checkpoints": checkpoints(run),
    }


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(folder: Path, largest: bool) -> None:
    """Changes one bit in the middle of the largest file of a checkpoint, or of that which says where things lie."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file = files[-1] if largest else folder / "parameters" / "manifest.ocdbt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
