"""The atlas of a MiniCPM-2B with random weights: seconds and memory of the studies that read weights alone.

    python experiments/benchmarks/studies_2b.py FOLDER [--checkpoints 4] [--layers 1] [--preset minicpm-2b]

Makes a run with bfloat16 checkpoints in FOLDER if it is not there yet (5.45 GB each), written slice by slice; each
differs from the one before it by a small random step. Then it measures, each in a process of its own:

- movements: `run_atlas` of all slices of all checkpoints, without spectra; the most arrays are held here
- spectra: the same for the first two checkpoints, with the spectra of so many layers, of their updates, of their heads,
  and of the embedding

Files are read from the page cache as far as it holds them. Memory is the most that was resident, with what Python and
its libraries take. One line of JSON a measurement. Some twenty minutes on 2 CPU cores, 22 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from measured import sample, say

from cpmjax.analysis.atlas import run_atlas
from cpmjax.checkpoint.series import Series
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.model.presets import PRESETS
from cpmjax.model.weights import BFLOAT16, Weights, slice_shape
from cpmjax.run import cli
from cpmjax.run.config import CheckpointConfig, ModelConfig
from cpmjax.run.directory import RunDirectory

_EVERY = 1000  # steps between two checkpoints
_MEMORY = 4.0  # GB, at most
_MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


def make(folder: Path, model: dict[str, Any], checkpoints: int) -> list[int]:
    """A run of this model with so many checkpoints -> their steps; those that are there already are kept."""
    run = RunDirectory(folder)
    config = cli.decode({"model": model}, "the benchmark")
    if not run.exists:
        run.create(config, {"kind": "synthetic"})
    steps = [_EVERY * number for number in range(1, checkpoints + 1)]
    with contextlib.closing(Checkpoints(run.checkpoints, CheckpointConfig())) as store:
        for step in steps:
            if step not in store.steps():
                facts = {"step": step, "tokens": step, "stage": "stable", "learning_rate": 0.01}
                store.save_weights(step, _weights(config.model, step), facts)
    return steps


def _weights(config: ModelConfig, step: int) -> Weights:
    def read(path: str, layer: int | None) -> np.ndarray:
        shape, place = slice_shape(weights.specs[path]), (zlib.crc32(path.encode()), layer or 0)
        values = np.zeros(shape, np.float32)
        for number in range(step // _EVERY):  # the start, and the way from one checkpoint to the next
            drawn = np.random.default_rng((*place, number)).standard_normal(shape, np.float32)
            drawn *= 0.01 if number else 0.03
            values += drawn
        return values.astype(BFLOAT16)

    weights = Weights(config, {}, read)
    return Weights(config, dict.fromkeys(weights.specs, BFLOAT16), read)


def survey(run: Path, steps: Sequence[int], layers: Sequence[int], directory: Path) -> tuple[float, int]:
    """Seconds of an atlas, and the most bytes that this process has had resident."""
    began = time.perf_counter()
    run_atlas(Series(run), steps, layers, directory)
    return time.perf_counter() - began, _MAXRSS * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(folder: Path, preset: str, checkpoints: int, layers: int) -> Iterator[dict[str, Any]]:
    run = folder / preset
    steps = _alone(make, run, PRESETS[preset], checkpoints)
    middle = ModelConfig(**PRESETS[preset]).layers // 2
    chosen = range(middle, middle + layers)
    for name, at, spectra in (("movements", steps, ()), ("spectra", steps[:2], chosen)):
        directory = folder / f"atlas-{name}"
        (directory / "ledger.jsonl").unlink(missing_ok=True)  # of an earlier round
        seconds, memory = _alone(survey, run, at, spectra, directory)
        title = f"atlas of {preset}, {name}, {len(at)} checkpoints" + (f", {layers} layers" if spectra else "")
        yield sample(title, "s", seconds)
        yield sample(f"{title}: memory at most", "GB", memory / 1e9, bar=_MEMORY)


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own; the run is made in one as well, since the most memory that a
    process has had counts, on Linux, as that of those which it starts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1, help="whose spectra are taken (default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, default="minicpm-2b", help="which model (default: %(default)s)")
    options = parser.parse_args()
    say(measure(options.folder, options.preset, options.checkpoints, options.layers))
