"""Training jobs for tests: a small corpus, a small experiment, and the command in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax import serialization

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run import cli
from cpmjax.run.config import MeshConfig
from cpmjax.run.directory import Lines, RunDirectory
from cpmjax.train import main as train_job
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import abstract_state

Tree = dict[str, Any]

CLOCK = ("tokens_per_second", "mfu", "goodput", "seconds")  # what may differ between two runs of one experiment


def write_corpus(folder: Path, seed: int, documents: int = 40) -> Path:
    """Text files whose words repeat, so that a small model has something to learn; each seed has its own words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(120)]
    folder.mkdir(parents=True)
    for number in range(documents):
        text = " ".join(draw.choices(words, k=200))
        (folder / f"{number:03}.txt").write_text(text + "\n")
    return folder


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for the jobs of all tests of a session: what one has compiled, the next one finds in the cache."""
    folder = factory.getbasetemp() / "jobs"
    folder.mkdir(exist_ok=True)
    return folder


def experiment(folder: Path, directory: str | Path, **sections: Tree) -> Path:
    """Writes the YAML of a run of half a second: 32 steps, its decay on another corpus; `sections` override it.

    The corpora and the cache lie in `folder` and are shared by all runs there.
    """
    for seed, name in enumerate(("words", "others")):
        if not (folder / name).exists():
            write_corpus(folder / name, seed)
    tree: Tree = {
        "run": {"directory": str(folder / directory), "seed": 3, "cache": str(folder / "cache")},
        "model": {"vocabulary": 320, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dim_model_base": 16},
        "data": {
            "corpora": {name: {"type": "text", "path": str(folder / name)} for name in ("words", "others")},
            "stable": {"words": 1.0},
            "decay": {"words": 0.5, "others": 0.5},
            "sequence_length": 32,
            "held_out": 0.1,
        },
        "schedule": {"type": "wsd", "warmup": 5, "stable": 20, "decay": 7},
        "training": {"batch_size": 4},
        "checkpoint": {"every": 5},
        "evaluation": {"every": 5, "rows": 4, "prompts": ["ab"], "sample_tokens": 8, "temperature": 1.0},
        "log": {"tensorboard": False},
    }
    for section, keys in sections.items():
        tree[section] = tree.get(section, {}) | keys
    file = folder / f"{Path(directory).name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def start(*arguments: str | Path, devices: int = 1) -> subprocess.Popen[str]:
    """The job in a process that is left running."""
    return subprocess.Popen(
        [sys.executable, "-m", "cpmjax.train", *map(str, arguments)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs are kept too: a restart is quick
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for the end of a job: (exit code, stderr)."""
    _, stderr = process.communicate(timeout=240)
    return process.returncode, stderr


def train(*arguments: str | Path, devices: int = 1) -> str:
    """Runs a job that must end well; returns its stderr."""
    code, stderr = finish(start(*arguments, devices=devices))
    assert code == 0, stderr
    return stderr


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def signal_at(process: subprocess.Popen[str], moment: Callable[[], bool], number: signal.Signals) -> bool:
    """Sends a signal while `moment` holds; False if the process ended without such a moment.

    The process is halted first and the moment looked at again, so that it certainly holds when the signal comes.
    """
    while process.poll() is None:
        if moment():
            os.kill(process.pid, signal.SIGSTOP)
            while "State:\tT" not in Path(f"/proc/{process.pid}/status").read_text():
                time.sleep(0.001)
            holds = moment()
            if holds:
                os.kill(process.pid, number)
            if not (holds and number == signal.SIGSTOP):
                os.kill(process.pid, signal.SIGCONT)
            if holds:
                return True
    return False


def refusal(*arguments: str | Path) -> str:
    """The one line, without its `error: `, with which the job must refuse the arguments. Runs in this process."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    argv, stderr = sys.argv, io.StringIO()
    sys.argv = ["train", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as caught:
            cli.main(train_job)
    finally:
        sys.argv = argv
        jax.config.update("jax_compilation_cache_dir", cache)
    return error_line(int(caught.value.code or 0), stderr.getvalue())


def error_line(code: int, stderr: str) -> str:
    """The error of a job that ended with one, as a user must see it."""
    assert code == 2, stderr
    assert "Traceback" not in stderr, stderr
    *before, last = stderr.splitlines()
    assert last.startswith("error: ") and not any(line.startswith("error:") for line in before), stderr
    return last.removeprefix("error: ")


def records(run: str | Path, *, clock: bool = False) -> list[Tree]:
    """metrics.jsonl, by default without what the clock says."""
    lines = Lines.read(RunDirectory(run).metrics_file)
    return [{key: value for key, value in line.items() if clock or key not in CLOCK} for line in lines]


def checkpoint_arrays(run: str | Path, step: int) -> dict[str, np.ndarray]:
    """{"parameters/...": array, "optimizer/...": array} of a checkpoint, whatever mesh it was written from."""
    directory = RunDirectory(run)
    config = cli.decode(directory.read_config(), str(run))
    optimizer = make_optimizer(config.model, config.optimizer)
    abstract = abstract_state(config.model, optimizer, make_mesh(MeshConfig()))
    with contextlib.closing(Checkpoints(directory.checkpoints)) as store:
        items = {
            "parameters": store.parameters(step, abstract.trainable),
            **({"average": store.parameters(step, item="average")} if store.has_average(step) else {}),
            "optimizer": serialization.to_state_dict(store.optimizer(step, abstract.optimizer)),
        }
    leaves = jax.tree_util.tree_leaves_with_path(items)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def outcome(run: str | Path) -> dict[str, str | bytes]:
    """Everything that a run has led to so far and that does not come from the clock, piece by piece."""
    directory = RunDirectory(run)
    found: dict[str, str | bytes] = {}
    if directory.metrics_file.is_file():
        # As text, so that NaN equals NaN; floats are written so that no bit is lost.
        found |= {f"metrics line {number}": json.dumps(line) for number, line in enumerate(records(run), 1)}
    if directory.samples_file.is_file():
        samples = Lines.read(directory.samples_file)
        found |= {f"samples line {number}": json.dumps(line) for number, line in enumerate(samples, 1)}
    if directory.checkpoints.is_dir():
        with contextlib.closing(Checkpoints(directory.checkpoints)) as store:
            steps = store.steps()
            found |= {f"{step} position": json.dumps(store.position(step)) for step in steps}
            found |= {f"{step} metadata": json.dumps(store.metadata(step)) for step in steps}
        for step in steps:
            found |= {f"{step} {name}": array.tobytes() for name, array in checkpoint_arrays(run, step).items()}
    return found


def unequal(found: dict[str, str | bytes], expected: dict[str, str | bytes], *, finished: bool = True) -> list[str]:
    """The pieces of an outcome that are not as expected; those that are missing, too, once the run is finished."""
    pieces = found.keys() | expected.keys() if finished else found.keys()
    return sorted(piece for piece in pieces if found.get(piece) != expected.get(piece))


def steps_of(run: str | Path) -> list[int]:
    """Steps with a complete checkpoint, as anyone sees them from outside."""
    folder = Path(run) / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def lines_of(run: str | Path) -> int:
    """Complete lines in metrics.jsonl."""
    file = Path(run) / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0
