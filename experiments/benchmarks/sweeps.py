"""A learning-rate sweep in one process beside one process a trial, and trials mapped into one program.

    python experiments/benchmarks/sweeps.py EXPERIMENT [--rates 12] [--seeds 3] [--rounds 1]

One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measured import sample, say

from cpmjax.model import mup
from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.training.step import Rates
from cpmjax.tunnel import transfer
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.workbench import Workbench, as_arrays


def trial_losses(experiment: Path, cache: Path, rates: list[float], seeds: list[int]) -> dict[tuple[float, int], float]:
    """The held-out loss at the end of a trial for each rate and seed, one after another in this process."""
    config = cli.load([str(experiment), f"--run.cache={cache}"], PRESETS, "")
    with Workbench(config, lambda _: None) as workbench:
        width = Axis("width", (config.model.width,))
        trials = transfer.make_trials(config, [width], ["minicpm"], ["coupled"], rates, max(seeds) + 1)
        wanted = [trial for trial in trials if trial.config.run.seed in seeds]
        return {
            (trial.config.optimizer.learning_rate, trial.config.run.seed): transfer.measure(workbench, trial)[-1][
                "heldout_loss"
            ]
            for trial in wanted
        }


def in_new_process(experiment: Path, cache: Path, rates: list[float], seeds: list[int]) -> tuple[float, dict]:
    """(seconds from before the process starts until its result is here, the result)"""
    began = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        losses = pool.submit(trial_losses, experiment, cache, rates, seeds).result()
    return time.perf_counter() - began, losses


def measure_sweep(experiment: Path, rounds: int, rates: int, seeds: int) -> Iterator[dict[str, Any]]:
    """One process for all trials and one process a trial, by turns.

    Both find the tokenised text and the compiled programs in a cache that is filled before.
    """
    grid = [0.01 * 2.0 ** (number / 2 - rates // 4) for number in range(rates)]
    with tempfile.TemporaryDirectory(prefix="cpmjax-bench-") as name:
        cache = Path(name)
        in_new_process(experiment, cache, grid[:1], [0])
        for _ in range(rounds):
            sweep, together = in_new_process(experiment, cache, grid, list(range(seeds)))
            alone = {key: in_new_process(experiment, cache, [key[0]], [key[1]]) for key in together}
            apart = sum(seconds for seconds, _ in alone.values())
            other = sum(losses != {key: together[key]} for key, (_, losses) in alone.items())
            yield sample(f"{rates} rates x {seeds} seeds in one process", "s", sweep)
            yield sample("the same, one process a trial", "s", apart)
            yield sample("share of the time of one process a trial", "%", 100 * sweep / apart, bar=60)
            yield sample("trials whose loss is another", "", other, bar=0)


def measure_mapping(experiment: Path, rounds: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A step of several trials mapped into one program (`jax.vmap`) beside as many steps of one, at two widths."""
    steps = 20
    config = cli.load([str(experiment)], PRESETS, "")
    with Workbench(config, lambda _: None) as workbench:
        for width in (config.model.width // 2, 4 * config.model.width):
            model = Axis("width", (width,)).model(config.model, width, "minicpm")
            trial = replace(config, model=model)
            program = workbench.program(trial)
            scales = as_arrays(mup.scales(model))
            batch = workbench.text(trial).batches(0, config.training.batch_size)
            rates = Rates(np.float32(0.01), np.float32(1e-3))
            mapped = jax.jit(jax.vmap(program.function, in_axes=(0, None, None, None)), donate_argnums=0)
            states = [program.begin(jax.random.key(seed), scales) for seed in range(seeds)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
            stacked, _ = mapped(stacked, batch, rates, scales)
            for _ in range(rounds):
                began = time.perf_counter()
                for _ in range(steps):
                    stacked, _ = mapped(stacked, batch, rates, scales)
                jax.block_until_ready(stacked)
                middle = time.perf_counter()
                for _, number in itertools.product(range(steps), range(seeds)):
                    states[number], _ = program.step(states[number], batch, rates, scales)
                jax.block_until_ready(states)
                ratio = (middle - began) / (time.perf_counter() - middle)
                yield sample(f"{seeds} seeds mapped / one by one, width {width}", "", ratio)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--rates", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    say(measure_sweep(options.experiment, options.rounds, options.rates, options.seeds))
    say(measure_mapping(options.experiment, options.rounds, options.seeds))
