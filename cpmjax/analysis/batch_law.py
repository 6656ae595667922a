"""The batch with which a loss costs the fewest tokens, and how it grows as the loss falls.

MiniCPM (Hu et al. 2404.06395, section 3.2, after Kaplan et al. 2001.08361): the same model is trained with several
batches. For each level of the loss the points (batch, tokens at which the loss is reached) lie on a bowl; in logarithms
a parabola is fitted to them, and its lowest point is the best batch of that level. Through those of all levels and
sizes goes

    batch = A / L^p,    A = 1.21e9 and p = 6.24 in the paper, for tokens and nats per token of C4.

p does not depend on the unit of the loss, A does: for a loss in bits or per byte, L = k l, it is A / k^p.

B batches, S seeds, T the amounts of tokens at which the loss was looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

from cpmjax.analysis.rows import Interval

LEVEL_STEP = 0.02  # from one level of the loss to the next, of its logarithm
_AROUND = 2  # batches on either side of the best one that the parabola goes by


@dataclass(frozen=True)
class BatchLaw:
    """batch = A / L^p."""

    A: float
    p: float

    def batch(self, loss: Any) -> Any:
        return self.A / loss**self.p


Curve = tuple[np.ndarray, np.ndarray]  # tokens [T], and the loss there [T]
PAPER = BatchLaw(1.21e9, 6.24)


@dataclass(frozen=True)
class Minimum:
    """The lowest point of the parabola of a level; batch and tokens in tokens."""

    loss: float
    batch: float
    tokens: float
    curvature: float  # of log tokens over log batch


def falling(losses_T: np.ndarray) -> np.ndarray:
    """The curve that never rises and is nearest to a noisy one; infinite from where that is not finite."""
    found_T, finite = np.full(len(losses_T), np.inf), np.isfinite(losses_T)
    end = len(losses_T) if finite.all() else int(finite.argmin())
    if end:
        found_T[:end] = isotonic_regression(losses_T[:end], increasing=False).x
    return found_T


def tokens_to(level: float, tokens_T: np.ndarray, losses_T: np.ndarray) -> float:
    """Tokens at which a curve falls to a level, by its logarithm between two points; NaN if not inside of the curve.

    What was reached before the first point is not inside: nobody knows when.
    """
    losses_T = falling(losses_T)
    below = np.flatnonzero(losses_T <= level)
    if not len(below) or below[0] == 0:
        return float("nan")
    high, low = losses_T[below[0] - 1], losses_T[below[0]]
    start, end = np.log(tokens_T[below[0] - 1 : below[0] + 1])
    return float(np.exp(start + (end - start) * (high - level) / (high - low)))


def levels(curves: Sequence[Curve]) -> np.ndarray:
    """Levels of the loss, from the highest down, that at least three curves reach inside; the same grid everywhere."""
    found = [falling(losses_T) for _, losses_T in curves]
    ends = np.array([(curve[0], curve[np.isfinite(curve)][-1]) for curve in found if np.isfinite(curve[0])])
    if len(ends) < 3:
        return np.array([])
    first, last = (int(np.log(end) / LEVEL_STEP) for end in (ends.max(), ends.min()))
    grid = np.exp(LEVEL_STEP * np.arange(first, last, -1))
    reached = np.sum((ends[:, :1] > grid) & (grid >= ends[:, 1:]), axis=0)
    return grid[reached >= 3]


def minimum(level: float, batches_B: np.ndarray, tokens_B: np.ndarray) -> Minimum | None:
    """Of the parabola through the best batch and its neighbours, up to two on either side; tokens NaN if not reached.

    None if there is no bowl to see: the best of the batches has no neighbour on one side that reaches the level, or the
    lowest point of the parabola lies beyond these neighbours.
    """
    if np.isnan(tokens_B).all():
        return None
    best = int(np.nanargmin(tokens_B))
    if best in (0, len(tokens_B) - 1) or np.isnan(tokens_B[best - 1 : best + 2]).any():
        return None
    near = [i for i in range(len(tokens_B)) if abs(i - best) <= _AROUND and np.isfinite(tokens_B[i])]
    x_B = np.log(batches_B / batches_B[best])
    a, b, c = np.polyfit(x_B[near], np.log(tokens_B[near]), 2)
    lowest = -b / (2 * a)
    if not (a > 0 and x_B[best - 1] < lowest < x_B[best + 1]):
        return None
    batch, tokens = batches_B[best] * np.exp(lowest), np.exp(c + b * lowest / 2)
    return Minimum(float(level), float(batch), float(tokens), float(2 * a))


def minima(batches_B: np.ndarray, curves: Sequence[Curve]) -> list[Minimum | None]:
    """One for each of `levels`; a curve for each batch."""
    return [
        minimum(level, batches_B, np.array([tokens_to(level, *curve) for curve in curves])) for level in levels(curves)
    ]


def fit(losses: Sequence[float], batches: Sequence[float], groups: Sequence[Any] | None = None) -> BatchLaw:
    """By least squares on logarithms; with `groups` p is common to them and A the geometric mean of their own ones.

    NaN with fewer than three points, or if the loss is the same in each group.
    """
    x, y = np.log(losses), np.log(batches)
    names = [0] * len(x) if groups is None else list(groups)
    members = [[i for i, name in enumerate(names) if name == each] for each in dict.fromkeys(names)]
    dx, dy = (np.concatenate([z[m] - z[m].mean() for m in members]) if members else z for z in (x, y))
    if len(x) < 3 or np.ptp(dx) < 1e-12:
        return BatchLaw(float("nan"), float("nan"))
    p = -float(dx @ dy / (dx @ dx))
    return BatchLaw(float(np.exp(np.mean([y[m].mean() + p * x[m].mean() for m in members]))), p)


def over_seeds(statistic: Callable[[np.ndarray], Any], seeds: int) -> Interval:
    """`statistic` of the numbers of the seeds that count; its interval is that of the jackknife, which leaves out one
    at a time, with Student's t: no narrower than so few seeds allow. Without end if there is one seed."""
    value = statistic(np.arange(seeds))
    if seeds < 2:
        return Interval(value, value - np.inf, value + np.inf)
    without_S = np.array([statistic(np.delete(np.arange(seeds), seed)) for seed in range(seeds)])
    error = np.sqrt((seeds - 1) * np.mean((without_S - without_S.mean(axis=0)) ** 2, axis=0))
    reach = stdtrit(seeds - 1, 0.975) * error
    return Interval(value, value - reach, value + reach)
