"""Merges of checkpoints: sums with coefficients {step: c} that add up to 1, and what share of a decay they replace.

LAWA and SWA take the mean of the last ones (Kaddour 2209.14981), an exponential average weighs by age, WSM imitates any
decay of the learning rate (2507.17634), Extra-Merge goes on along the line of consecutive merges (2605.26484).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cpmjax.analysis.rows import Interval, bootstrap
from cpmjax.analysis.text import tokenizer_of
from cpmjax.checkpoint.series import Series
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.model.parameters import Tree
from cpmjax.model.weights import FLOAT32, Weights
from cpmjax.run.config import BranchConfig, CheckpointConfig
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import Schedule

Coefficients = Mapping[int, float]

_AT_ONCE = 1 << 22  # numbers of a slice that are widened at one time


# Coefficients. Steps ascend.


def lawa(steps: Sequence[int], window: int) -> dict[int, float]:
    """The mean of the last `window` checkpoints. Raises UserError if there are fewer."""
    if not 1 <= window <= len(steps):
        raise UserError(f"window = {window}: expected 1 to {len(steps)}, as many checkpoints as there are")
    return dict.fromkeys(steps[-window:], 1 / window)


def ema(steps: Sequence[int], keep: float) -> dict[int, float]:
    """Weighted by keep ** age, in checkpoints: the exponential average, corrected for its beginning. 0 < keep < 1."""
    weights = keep ** np.arange(len(steps) - 1, -1, -1.0)
    return dict(zip(steps, (weights / weights.sum()).tolist(), strict=True))


def wsm(steps: Sequence[int], target: Schedule | Sequence[float]) -> dict[int, float]:
    """What stands in for a decay that begins at the first of k + 1 steps and ends at the last.

    `target` gives each of the k intervals its share of the peak rate: a schedule in steps (the mean over the updates of
    the interval), or the k shares. With shares w_i, c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k, so that the merge is
    theta_0 + sum_i w_i (theta_i - theta_(i-1)): every update is in it with its share.
    """
    if isinstance(target, Schedule):
        intervals = itertools.pairwise(steps)
        target = [float(np.mean(target.factor(np.arange(first + 1, last + 1)))) for first, last in intervals]
    if len(target) != len(steps) - 1:
        raise UserError(
            f"{len(target)} shares of the peak: expected {len(steps) - 1}, one between each two checkpoints"
        )
    return dict(zip(steps, (-np.diff([1.0, *target, 0.0])).tolist(), strict=True))


def extrapolated(earlier: Coefficients, later: Coefficients, by: float) -> dict[int, float]:
    """The later merge, moved on by so many times the way to it from the earlier one."""
    steps = sorted(earlier.keys() | later.keys())
    return {step: (1 + by) * later.get(step, 0.0) - by * earlier.get(step, 0.0) for step in steps}


def as_rows(merges: Sequence[Coefficients], steps: Sequence[int]) -> np.ndarray:
    """[merges, steps]: their coefficients as `cpmjax.analysis.geometry.of_mixtures` takes them."""
    return np.array([[merge.get(step, 0.0) for step in steps] for merge in merges])


# Merges.


def merged(series: Series, coefficients: Coefficients) -> Weights:
    """The merge, read slice by slice: two slices are in memory, one of them a sum in float32.

    Raises UserError for coefficients that do not add up to 1, and for a step that is not there or is damaged.
    """
    total = sum(coefficients.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"coefficients of a merge add up to {total:g}; expected 1")
    parts = [(np.float32(c), series.weights(step)) for step, c in sorted(coefficients.items()) if c]

    def read(path: str, layer: int | None) -> np.ndarray:
        sums: np.ndarray | None = None
        for coefficient, weights in parts:
            stored = weights.read(path, layer)
            if sums is None:
                sums = np.zeros(stored.shape, FLOAT32)
            rows = max(1, _AT_ONCE // max(1, stored[:1].size))
            for start in range(0, len(stored), rows):
                part = slice(start, start + rows)
                sums[part] += coefficient * stored[part].astype(FLOAT32)
        assert sums is not None  # some coefficient is not 0
        return sums

    first = parts[0][1]
    return dataclasses.replace(first, dtypes=dict.fromkeys(first.dtypes, FLOAT32), read=read)


def merge(series: Series, coefficients: Coefficients) -> Tree:
    """The merge as a nested dict of float32 arrays on the default device. Raises UserError as `merged`."""
    return merged(series, coefficients).tree()


def write_merge(series: Series, coefficients: Coefficients, directory: str | Path) -> Series:
    """Writes the merge as a run of one checkpoint, in float32, to be loaded, sampled from, converted or branched from.

    It takes the place of the newest checkpoint in it: its step, stage and rate. Slice by slice, as `merged`; raises
    UserError as that does, and if the directory holds something.
    """
    weights, step = merged(series, coefficients), max(step for step, c in coefficients.items() if c)
    tokenizer = tokenizer_of(series) if RunDirectory(series.path).tokenizer_file.exists() else None
    config = dataclasses.replace(
        series.config,
        run=dataclasses.replace(series.config.run, directory=str(directory)),
        branch=BranchConfig(),
        checkpoint=CheckpointConfig(),
    )
    facts = {
        "step": step,
        "tokens": series.tokens(step),
        "stage": series.stage(step),
        "learning_rate": series.learning_rate(step),
    }
    run = RunDirectory(directory)
    with run.lock():
        if tokenizer is not None:
            tokenizer.save(run.path)
        by_step = {str(step): c for step, c in sorted(coefficients.items())}
        run.create(config, {"kind": "merge", "source": str(series.path.resolve()), "coefficients": by_step})
        with contextlib.closing(Checkpoints(run.checkpoints, CheckpointConfig())) as checkpoints:
            checkpoints.save_weights(step, weights, facts)
    return Series(run.path)


# What a merge is worth.


def share_of_drop(last_R: np.ndarray, merge_R: np.ndarray, decayed_R: np.ndarray) -> Interval:
    """How much of the way from the last checkpoint's loss to the decayed one's a merge goes, all on the same rows: 0 is
    as good as the last checkpoint, 1 as good as the decay."""

    def share(last: np.ndarray, found: np.ndarray, decayed: np.ndarray) -> np.ndarray:
        return (last - found) / (last - decayed)

    return bootstrap(share, last_R, merge_R, decayed_R)
