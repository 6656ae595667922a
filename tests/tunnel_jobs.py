"""Small wind tunnels for tests: an experiment whose trials take a fraction of a second."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest

from cpmjax import study
from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.tunnel import coordinate_check as check
from cpmjax.tunnel.coordinate_check import STEPS
from cpmjax.tunnel.trials import Trial, Trials
from cpmjax.tunnel.workbench import Workbench

MODEL = {"vocabulary": 320, "width": 16, "layers": 1, "heads": 2, "feed_forward": 40, "dim_model_base": 16}


def experiment(folder: Path, **sections: dict) -> Path:
    return jobs.experiment(
        folder,
        "tunnel",
        model=MODEL | {"layers_base": 1} | sections.pop("model", {}),
        schedule={"type": "wsd", "warmup": 2, "stable": 8, "decay": 2} | sections.pop("schedule", {}),
        evaluation={"every": 4, "rows": 4},
        **sections,
    )


def config(folder: Path, *overrides: str) -> Config:
    return cli.load([str(experiment(folder)), f"--run.directory={folder / 'study'}", *overrides], PRESETS, "")


@contextlib.contextmanager
def workbench(config: Config) -> Iterator[Workbench]:
    """A workbench that leaves jax's settings as they were."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    try:
        with Workbench(config, lambda _: None) as bench:
            yield bench
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


def family(factory: pytest.TempPathFactory, *keys: str) -> Config:
    """The experiment of the wind tunnel."""
    file = Path(__file__).parents[1] / "experiments" / "tunnel" / "family.yaml"
    cache = jobs.shared_folder(factory) / "cache"
    return cli.load([str(file), f"--run.cache={cache}", *keys], PRESETS, "")


def slopes_of(config: Config, planned: list[Trial], directory: Path) -> list[check.Slope]:
    """What the coordinate check finds of its trials."""
    with workbench(config) as bench:
        trials = Trials(directory, planned, bench.recipe)
        with trials.lock():
            trials.run(lambda trial: check.measure(bench, trial))
    return check.slopes(trials.rows())


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles, or takes from its cache, inside."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Compiling "):
                names.append(message.split()[1])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def run_study(*arguments: object) -> tuple[int, str]:
    """Exit code and stdout of a study that must not show a traceback. Runs in this process."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    argv, stdout, stderr = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["study", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as caught,
        ):
            cli.main(study.main)
    finally:
        sys.argv = argv
        jax.config.update("jax_compilation_cache_dir", cache)
    code = int(caught.value.code or 0)
    return code, jobs.error_line(code, stderr.getvalue()) if code == 2 else stdout.getvalue()


def without_clock(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# Made-up tables of results.


def made_up_coordinates(
    power: float, quantity: str = "attention 1", kind: str = "change", axis: str = "width", name: str = "minicpm"
):
    """Rows of a check in which one quantity grows with a power of the size and the others stay."""
    rows = []
    for size, seed, step in np.ndindex(4, 2, len(STEPS)):
        size = 2 ** (size + 1)
        for each in ("embedding", "attention 0", "attention 1", "final hidden", "logits", "loss", "spectral gate"):
            numbers = {"size": 1.0 + seed, "change": 2.0 + seed}
            if each == quantity and STEPS[step] == 3:
                numbers[kind] *= size**power
            labels = {"parametrisation": name, "axis": axis, axis: size, "seed": seed, "status": "finished"}
            rows.append(labels | {"step": STEPS[step], "quantity": each} | numbers)
    return rows


RATES = [0.01 * 2.0**octave for octave in range(-4, 5)]
WIDTHS = (32, 64, 128, 256)


def made_up_losses(optimum, floor, name="minicpm", seeds=2, axis="width", diverged=(), bowl=0.1):
    """Losses floor(width) + bowl * (octaves from optimum(width))^2 at the end, and 1 more in the middle."""
    found = []
    for width in WIDTHS:
        for rate in RATES:
            for seed in range(seeds):
                labels = {"parametrisation": name, "weight_decay": "coupled", "axis": axis, axis: width}
                labels |= {"learning_rate": rate, "seed": seed}
                if (width, rate) in diverged:
                    found.append(labels | {"status": "diverged"})
                    continue
                loss = floor(width) + bowl * math.log2(rate / optimum(width)) ** 2 + 0.001 * seed
                for step, more in ((100, 1.0), (200, 0.0)):
                    found.append(labels | {"status": "finished", "step": step, "heldout_loss": loss + more})
    return found


def falling(width):
    return 4 - 0.1 * math.log2(width)
