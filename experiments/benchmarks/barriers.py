"""What a loss between two checkpoints costs, beside a plain forward loss.

    python experiments/benchmarks/barriers.py SERIES [--checkpoints 30] [--rows 8] [--inside 3] [--rounds 3]

The barrier matrix of so many checkpoints of a series (a run, its parents and its branches; evenly spread): its time,
reading the checkpoints included, over its evaluations. Whenever it has read a checkpoint, a plain `series.loss_of` on
the same rows is timed as well, so that whatever else the machine does meets both. Everything is compiled before the
first round, and read from the page cache. One line of JSON a sample. On the study series (0.8 M parameters) about a
minute and a half a round on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measured import sample, say

from cpmjax import Series
from cpmjax.analysis.interpolation import barriers
from cpmjax.analysis.text import text_rows
from cpmjax.model.parameters import Tree

_BAR = 1.2  # an evaluation between two checkpoints, in plain losses
_PLAIN: list[float] = []  # seconds of each


class Timed(Series):
    """A series that takes a plain loss of the parameters whenever they are read."""

    batch: dict[str, Any]

    def parameters(self, step: int) -> Tree:
        parameters = super().parameters(step)
        began = time.perf_counter()
        self.loss_of(parameters, self.batch).block_until_ready()
        _PLAIN.append(time.perf_counter() - began)
        return parameters


def spread(series: Series, count: int) -> list[tuple[Timed, int]]:
    """Checkpoints of the series and of its branches, each once."""
    places = [(Timed(series.path), step) for step in series.steps]
    for branch in series.branches().values():
        line = Timed(branch.path)
        places += [(line, step) for step in line.steps if step > line.branch_step]
    return [places[index] for index in np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)]


def main(path: Path, checkpoints: int, rows: int, inside: int, rounds: int) -> None:
    series = Series(path)
    batch = jax.device_put(text_rows(series, {"type": "standard_library"}, rows))
    Timed.batch = batch
    places = spread(series, checkpoints)
    count, tokens = len(places), batch["tokens"].size
    evaluations = count + count * (count - 1) // 2 * inside
    barriers(places[:: count - 1], batch, inside)
    for _ in range(rounds):
        _PLAIN.clear()
        began = time.perf_counter()
        barriers(places, batch, inside)
        seconds = time.perf_counter() - began - sum(_PLAIN)
        each, alone = seconds / evaluations, sum(_PLAIN) / len(_PLAIN)
        say(
            [
                sample(f"barriers between {count} checkpoints, {evaluations:,} losses", "s", seconds),
                sample(f"one of them, on {tokens:,} tokens", "ms", 1e3 * each),
                sample(f"a plain loss on {tokens:,} tokens", "ms", 1e3 * alone),
                sample("a loss between checkpoints, in plain losses", "", each / alone, bar=_BAR),
            ]
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    parser.add_argument("--checkpoints", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8, help="of held-out text (default: %(default)s)")
    parser.add_argument("--inside", type=int, default=3, help="places between two checkpoints (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    main(options.series, options.checkpoints, options.rows, options.inside, options.rounds)
