"""The project's own measurements.

usage: python -m cpmjax.bench train   [--experiment YAML] [--steps N] [--shapes NAME...] [--batches N...]
                                      [--levanter PYTHON] [--text FOLDER] [--rounds N] [--output FILE.json]
       python -m cpmjax.bench studies [--parts NAME...] [--series RUN] [--folder F] [--experiment YAML] [--rounds N]
                                      [--rates N] [--seeds N] [--output FILE.json]
       python -m cpmjax.bench convert [--folder F] [--preset NAME] [--rounds N] [--mutants N] [--output FILE.json]
       python -m cpmjax.bench sample  [--folder F] [--shapes NAME...] [--sampling NAME...] [--rounds N] [--rows N]
                                      [--output FILE.json]
       python -m cpmjax.bench scale   [--topologies NAME...] [--folder F] [--rounds N] [--plot FILE.png]
                                      [--table FILE.md] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from cpmjax.model.presets import PRESETS
from cpmjax.parallel.machine import machine
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.sharding import partition
from cpmjax.run import cli
from cpmjax.run.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.directory import Lines, RunDirectory, now, versions, write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.interrupt import SAVED_AND_STOPPED
from cpmjax.run.optimizers import AdamW
from cpmjax.run.table import aligned
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import abstract_state
from cpmjax.training.step import Rates, abstract_batch, make_step, next_token_loss

_EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_SHALLOW, _DEEP = 4, 40  # layers
_SLICES = ["v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"]  # 8 to 256 chips
_PATIENCE = 600.0  # seconds without a line of metrics after which a run is given up


@dataclass(frozen=True)
class Measurement:
    """The median of `samples`; `bar` is the most it may be, `floor` the least, None where nothing was promised."""

    name: str
    unit: str
    samples: list[float]
    bar: float | None = None
    floor: float | None = None

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def verdict(self) -> str:
        if self.bar is None and self.floor is None:
            return ""
        missed = (self.bar is not None and self.value > self.bar) or (
            self.floor is not None and self.value < self.floor
        )
        return "MISSED" if missed else "within"


# Compile time.


def compile_seconds(layers: int) -> float:
    """Seconds to trace, lower and compile the training step of a narrow model; nothing of it is taken from a cache."""
    model = ModelConfig(vocabulary=512, width=64, layers=layers, heads=4, feed_forward=160, dim_model_base=64)
    config = Config(model=model, data=DataConfig(sequence_length=128), training=TrainingConfig(batch_size=8))
    optimizer = make_optimizer(model, AdamW())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    by_row = NamedSharding(mesh, partition(("rows", "length")))
    batch = abstract_batch(config, by_row)
    state = abstract_state(model, optimizer, mesh)
    jax.clear_caches()
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        step = make_step(model, next_token_loss(model, config.compute, 0.0), optimizer, accumulation=1)
        jax.jit(step, donate_argnums=0).lower(state, batch, Rates(np.float32(0), np.float32(0))).compile()
        return time.perf_counter() - began


def measure_compilation(rounds: int) -> list[Measurement]:
    """Depths take turns, so that whatever else the machine does meets both; the first compilation of all is dropped."""
    jax.config.update("jax_enable_compilation_cache", False)
    compile_seconds(_SHALLOW)
    seconds: dict[int, list[float]] = {_SHALLOW: [], _DEEP: []}
    for _, layers in itertools.product(range(rounds), seconds):
        seconds[layers].append(compile_seconds(layers))
    shallow, deep = (
        Measurement(f"compilation of the step, {layers} scanned layers", "s", samples)
        for layers, samples in seconds.items()
    )
    return [shallow, deep, Measurement("ratio of the two medians", "", [deep.value / shallow.value], bar=1.2)]


# Runs of the job, in processes of their own.


@contextlib.contextmanager
def job(experiment: Path, directory: Path, cache: Path) -> Iterator[Callable[[int], float]]:
    """`python -m cpmjax.train`; yields a function that waits for so many lines of metrics: seconds since the start.

    When the block ends, the run is asked to save and stop; what it has said lies in `directory`.stderr.
    """
    keys = (f"--run.directory={directory}", f"--run.cache={cache}", "--log.every=1")
    metrics, said = RunDirectory(directory).metrics_file, directory.with_suffix(".stderr")
    with open(said, "wb") as stderr:
        began = time.perf_counter()
        command = [sys.executable, "-m", "cpmjax.train", str(experiment), *keys]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)

    def failed(expected: str) -> UserError:
        last = (said.read_text(errors="replace").splitlines() or ["nothing"])[-1]
        return UserError(f"{experiment}: expected {expected}; the last that the run said: {last}")

    def wait_for(lines: int) -> float:
        while True:
            ended, seconds = process.poll() is not None, time.perf_counter() - began
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
                return seconds
            if ended or seconds > _PATIENCE:
                raise failed(f"{lines} steps in {_PATIENCE:.0f} s")
            time.sleep(0.01)

    try:
        yield wait_for
        process.send_signal(signal.SIGTERM)
        if process.wait(_PATIENCE) not in (0, SAVED_AND_STOPPED):
            raise failed("that it stops when asked to")
    finally:
        process.kill()
        process.wait()


def measure_runs(experiment: Path, rounds: int, steps: int) -> tuple[list[Measurement], dict[str, Any]]:
    """Runs with an empty cache and runs that find it filled, by turns; the latter go on for some steps.

    -> measurements, and what a run says about itself: the formula of its MFU, and versions.
    """
    first = Measurement("start to first step, empty cache", "s", [], bar=60.0)
    later = Measurement("start to first step, after that", "s", [], bar=15.0)
    waiting = Measurement("share of time spent waiting for data", "%", [], bar=2.0)
    speed = Measurement("throughput", "tokens/s", [])
    mfu = Measurement("model FLOPs utilisation", "%", [])
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        for number in range(rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            with job(experiment, folder / "first", folder / "cache") as wait_for:
                first.samples.append(wait_for(1))
            with job(experiment, folder / "later", folder / "cache") as wait_for:
                later.samples.append(wait_for(1))
                wait_for(steps)
            run, said = RunDirectory(folder / "later"), (folder / "later.stderr").read_text()
            records = Lines.read(run.metrics_file)[1:]  # the first step begins before the clock does
            waiting.samples.append(_share_of_waiting(said))
            speed.samples.append(statistics.median(record["tokens_per_second"] for record in records))
            mfu.samples.append(100 * statistics.median(record["mfu"] for record in records))
            about = {
                "mfu_formula": re.findall("^MFU = .*$", said, re.MULTILINE)[0],
                "versions": run.provenance()["versions"],
            }
    return [first, later, waiting, speed, mfu], about


def _share_of_waiting(said: str) -> float:
    """In per cent, from the line with which the job sums up its steps."""
    found = re.search(r"\d+ steps in ([\d.,]+) s, .*; ([\d.,]+) s of it waiting for data", said)
    if found is None:
        raise ValueError("the job no longer says how long it waited for data")
    elapsed, waited = (float(number.replace(",", "")) for number in found.groups())
    return 100 * waited / elapsed if elapsed else 0.0


# Scripts of experiments/benchmarks.


def measured_by(name: str, *arguments: str) -> list[Measurement]:
    """What a script measures, which prints what `experiments/benchmarks/measured.py` says."""
    found: dict[str, Measurement] = {}
    for each in map(json.loads, _script(name, *arguments)):
        new = Measurement(each["name"], each["unit"], [], each["bar"], each["floor"])
        found.setdefault(each["name"], new).samples.append(each["sample"])
    return list(found.values())


def measure_conversions(folder: Path | None, preset: str, rounds: int) -> list[Measurement]:
    """A model converted to every format and from it, beside `cp` of its file in the same round."""
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        return measured_by("full_size.py", str(folder or name), f"--rounds={rounds}", f"--preset={preset}")


def measure_readers(mutants: int) -> list[Measurement]:
    """Of so many damaged files for each reader of weights, those that it neither reads nor refuses as it should."""
    found = []
    for line in _script("fuzz_readers.py", f"--mutants={mutants}", accepted=(0, 1))[1:]:
        if line.startswith(" "):  # where the mutant of a finding is kept
            print(line, file=sys.stderr)
            continue
        reader, tried, _, _, findings, _ = re.split("  +", line)
        found.append(Measurement(f"findings among {tried} mutants, {reader}", "", [int(findings.replace(",", ""))], 0))
    return found


def _script(name: str, *arguments: str, accepted: tuple[int, ...] = (0,)) -> list[str]:
    """The lines that it prints. Raises UserError if it ends with another exit code than the accepted."""
    script = _EXPERIMENTS / "benchmarks" / name
    # What is measured is the package beside the scripts, not one that is installed.
    environment = os.environ | {"PYTHONPATH": str(_EXPERIMENTS.parent)}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode not in accepted:
        raise UserError(f"{script}: exit code {done.returncode}; expected results, see above")
    return done.stdout.splitlines()


# What was measured, and where.


def report(benchmark: str, arguments: argparse.Namespace, measurements: list[Measurement], **about: Any) -> None:
    """Prints what was measured; with --output, keeps it as JSON."""
    found = {
        "benchmark": benchmark,
        "date": now(),
        "machine": machine(),
        **about,
        "measurements": [asdict(each) | {"median": each.value, "verdict": each.verdict} for each in measurements],
    }
    for key, value in found.items():
        if key not in ("benchmark", "measurements"):
            print(f"{key:<12} {value}")
    print(f"\n{table(measurements)}")
    if arguments.output is not None:
        write_atomically(arguments.output, json.dumps(found, indent=2) + "\n")


def table(measurements: list[Measurement]) -> str:
    rows = [("measurement", "median", "bar", "verdict", "samples")]
    for each in measurements:
        bar = f"<= {each.bar:g}" if each.bar is not None else f">= {each.floor:g}" if each.floor is not None else ""
        samples = ", ".join(f"{sample:.4g}" for sample in each.samples)
        rows.append((each.name, f"{each.value:.4g} {each.unit}".strip(), bar, each.verdict, samples))
    return aligned(rows)


def bench_train(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1 or arguments.steps < 2:
        raise UserError(f"--rounds = {arguments.rounds}, --steps = {arguments.steps}: expected at least 1 and 2")
    rounds = f"--rounds={arguments.rounds}"
    beside = ("--shapes", *arguments.shapes, "--batches", *map(str, arguments.batches))
    peers = measured_by("training.py", rounds, *beside, f"--levanter={arguments.levanter}")
    text = () if arguments.text is None else (str(arguments.text),)
    building = measured_by("building.py", *text, rounds, f"--megabytes={arguments.megabytes}")
    runs, about = measure_runs(arguments.experiment, arguments.rounds, arguments.steps)
    measurements = peers + building + measure_compilation(arguments.rounds) + runs
    about = {"experiment": arguments.experiment.name, "steps": arguments.steps, **about}
    about["versions"] |= versions("torch", "transformers", "sentencepiece")
    report("train", arguments, measurements, **about)


def bench_studies(arguments: argparse.Namespace) -> None:
    if min(arguments.rounds, arguments.rates, arguments.seeds) < 1:
        raise UserError("--rounds, --rates, --seeds: expected at least 1 of each")
    experiment, series, rounds = arguments.experiment, str(arguments.series), f"--rounds={arguments.rounds}"
    numbers = (f"--rates={arguments.rates}", f"--seeds={arguments.seeds}", rounds)
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        parts = {
            "sweeps": lambda: measured_by("sweeps.py", str(experiment.absolute()), *numbers),
            "notebooks": lambda: measured_by("notebooks.py", series, rounds),
            "barriers": lambda: measured_by("barriers.py", series, rounds),
            "full-size": lambda: measured_by("studies_2b.py", str(arguments.folder or name)),
        }
        found = [measurement for part in arguments.parts for measurement in parts[part]()]
    report("studies", arguments, found, experiment=experiment.name, versions=versions())


def bench_convert(arguments: argparse.Namespace) -> None:
    if min(arguments.rounds, arguments.mutants) < 1:
        raise UserError("--rounds, --mutants: expected at least 1 of each")
    conversions = measure_conversions(arguments.folder, arguments.preset, arguments.rounds)
    readers = measure_readers(arguments.mutants)
    report("convert", arguments, conversions + readers, preset=arguments.preset, versions=versions())


def bench_sample(arguments: argparse.Namespace) -> None:
    if min(arguments.rounds, arguments.rows) < 1:
        raise UserError("--rounds, --rows: expected at least 1 of each")
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        flags = (f"--rounds={arguments.rounds}", "--shapes", *arguments.shapes, "--sampling", *arguments.sampling)
        speed = measured_by("decoding.py", str(arguments.folder or name), *flags)
    invariance = measured_by("batch_invariance.py", f"--rows={arguments.rows}")
    report("sample", arguments, speed + invariance, versions=versions("torch", "transformers", "xllamacpp"))


def bench_scale(arguments: argparse.Namespace) -> None:
    """Plans where libtpu is installed, checkpoints, and the accelerators of this machine where it has any."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds = {arguments.rounds}: expected at least 1")
    found: list[Measurement] = []
    if importlib.util.find_spec("libtpu") is None:
        print("no plans: libtpu is not installed (pip install 'cpmjax[tpu]')", file=sys.stderr)
    else:
        files = [f"--{name}={getattr(arguments, name)}" for name in ("plot", "table") if getattr(arguments, name)]
        found += measured_by("scaling.py", "--topologies", *arguments.topologies, *files)
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        found += measured_by("checkpoints.py", str(arguments.folder or name), f"--rounds={arguments.rounds}")
    if jax.default_backend() == "cpu":
        print("no accelerator here: experiments/benchmarks/accelerator.py is for a machine with one", file=sys.stderr)
    else:
        found += measured_by("accelerator.py")
    report("scale", arguments, found, versions=versions("libtpu"))


def main(argv: list[str]) -> None:
    parser = cli.Parser(prog="python -m cpmjax.bench", description="The project's own measurements.")
    benchmarks = parser.add_subparsers(title="what there is", metavar="BENCHMARK", required=True)
    train = benchmarks.add_parser(
        "train", help="tokens/s beside PyTorch and levanter, token stores, compile time by depth, start, waiting, MFU"
    )
    train.add_argument("--shapes", nargs="+", default=["10m", "40m"], help="beside peers (default: %(default)s)")
    train.add_argument("--batches", type=int, nargs="+", default=[2, 8], help="rows of 512 (default: %(default)s)")
    train.add_argument("--levanter", default=sys.executable, help="a Python that has levanter (default: this one)")
    train.add_argument("--text", type=Path, help="a folder of .jsonl (default: the source of Python's library)")
    train.add_argument("--megabytes", type=int, default=50, help="of that source (default: %(default)s)")
    train.add_argument("--steps", type=int, default=60, help="of the runs with a filled cache (default: %(default)s)")
    train.set_defaults(run=bench_train, experiment=_EXPERIMENTS / "wsd.yaml", rounds=3)
    studies = benchmarks.add_parser(
        "studies", help="a sweep beside one process a trial; what each study takes on a series, and the atlas of a 2B"
    )
    parts = ["sweeps", "notebooks", "barriers", "full-size"]
    studies.add_argument("--parts", nargs="+", choices=parts, default=parts, help="(default: all)")
    studies.add_argument(
        "--series", type=Path, default="runs/study", help="of python -m cpmjax.study series (default: %(default)s)"
    )
    studies.add_argument("--folder", type=Path, help="where the 2B is made and kept (default: a temporary one)")
    studies.add_argument("--rates", type=int, default=12, help="learning rates of the sweep (default: %(default)s)")
    studies.add_argument("--seeds", type=int, default=3, help="seeds of each (default: %(default)s)")
    studies.set_defaults(run=bench_studies, experiment=_EXPERIMENTS / "tunnel" / "family.yaml", rounds=1)
    convert = benchmarks.add_parser(
        "convert", help="a MiniCPM-2B to every format and from it, beside cp; damaged files for every reader"
    )
    convert.add_argument("--folder", type=Path, help="where the models are made and kept (default: a temporary one)")
    convert.add_argument("--preset", choices=PRESETS, default="minicpm-2b", help="which model (default: %(default)s)")
    convert.add_argument("--mutants", type=int, default=100_000, help="for each reader (default: %(default)s)")
    convert.set_defaults(run=bench_convert, rounds=3)
    sample = benchmarks.add_parser(
        "sample", help="tokens/s beside transformers and llama.cpp, start, share of sampling, rows alone and in company"
    )
    sample.add_argument("--folder", type=Path, help="where the models are made and kept (default: a temporary one)")
    sample.add_argument("--shapes", nargs="+", default=["40m", "300m"], help="beside peers (default: %(default)s)")
    sample.add_argument(
        "--sampling",
        nargs="+",
        default=["40m", "minicpm-2b"],
        help="whose steps are taken apart (default: %(default)s)",
    )
    sample.add_argument("--rows", type=int, default=10_000, help="alone and in company (default: %(default)s)")
    sample.set_defaults(run=bench_sample, rounds=3)
    scale = benchmarks.add_parser(
        "scale", help="MiniCPM-2B planned on 8 to 256 chips, a checkpoint of 1 GB beside cp, accelerators that are here"
    )
    scale.add_argument("--topologies", nargs="+", default=_SLICES, help="to plan for (default: %(default)s)")
    scale.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary one)")
    scale.add_argument("--plot", type=Path, help="a picture of what chips send")
    scale.add_argument("--table", type=Path, help="a Markdown file for the plans")
    scale.set_defaults(run=bench_scale, rounds=3)
    for each in (train, studies):
        default = each.get_default("experiment")
        each.add_argument("--experiment", type=Path, default=default, help="what is run (default: %(default)s)")
    for each in (train, studies, convert, sample, scale):
        rounds = each.get_default("rounds")
        each.add_argument("--rounds", type=int, default=rounds, help="how often (default: %(default)s)")
        each.add_argument("--output", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args(argv)
    if "experiment" in arguments and not arguments.experiment.is_file():
        raise UserError(f"--experiment = {str(arguments.experiment)!r}: expected a YAML file")
    arguments.run(arguments)


if __name__ == "__main__":
    cli.main(main)
