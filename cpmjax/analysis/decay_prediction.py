"""What a decay will bring, before it is paid for: laws from the rates of all updates to the loss, fitted and scored.

A law (`Tissue`, `MultiPower`, `ConvexBound`) is fitted on the logs of runs without the decay in question, and scored on
the log of the one with it. A trunk at a constant rate says nothing of how the loss answers to a drop: fitted on it
alone, the first two have parameters that nothing determines, which `fit` refuses and `relative_errors` shows.

S updates, T losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.convex_bound import ConvexBound
from cpmjax.analysis.multi_power import MultiPower
from cpmjax.analysis.robust_fit import RobustFit
from cpmjax.analysis.tissue import Tissue
from cpmjax.checkpoint.series import Series
from cpmjax.run.errors import UserError

Law = Tissue | MultiPower | ConvexBound
LAWS: tuple[type[Law], ...] = (Tissue, MultiPower, ConvexBound)


@dataclass(frozen=True)
class Curve:
    """A run as a law sees it: the rate of every update, and the loss in nats after some of them.

    `rates_S` starts with the very first update, also of a branch: its trunk's are part of its past. `steps_T` counts
    the updates made before each loss was measured, 1 to S, ascending. The rates of the first `warmup` updates count,
    their changes do not: the law of a rising rate is not that of a falling one.
    """

    name: str
    rates_S: np.ndarray
    steps_T: np.ndarray
    losses_T: np.ndarray
    warmup: int = 0

    def after(self, step: int) -> Curve:
        """Its losses after more than `step` updates; all its rates."""
        later = self.steps_T > step
        return dataclasses.replace(self, steps_T=self.steps_T[later], losses_T=self.losses_T[later])


def curve(series: Series, losses: Literal["held_out", "training"] = "held_out", window: int = 10) -> Curve:
    """The log of a series from its first update on, its losses from the end of the warm-up on.

    Those of the evaluations on held-out rows; or means of the training loss over `window` updates, each of which is of
    other text: a decay of some tens of updates is hardly larger than their noise. Raises UserError for a series whose
    log does not hold every update, or no such loss: a law has nothing to be fitted on.
    """
    log = series.log()
    if not log or [record["step"] for record in log] != list(range(1, len(log) + 1)):
        found = f"{len(log)} records" if log else "no record (an import has none)"
        raise UserError(f"{series.path}: {found} in its log; expected one of every update from step 1 on")
    warmup = sum(record["stage"] == "warmup" for record in log)
    if losses == "held_out":
        found_T = [(i["step"], i["heldout_loss"]) for i in log if i["step"] > warmup and "heldout_loss" in i]
    else:
        # The loss of update s is that of the parameters after s - 1 updates. A window that is not full is left out at
        # the beginning, where the loss falls fastest.
        of_updates = [(record["step"] - 1, record["loss"]) for record in log[warmup:]]
        first = len(of_updates) % window
        windows = np.reshape(of_updates[first:], (-1, window, 2))
        found_T = [(int(steps.mean()), values.mean()) for steps, values in np.moveaxis(windows, 2, 1)]
    if not found_T:
        raise UserError(f"{series.path}: no {losses} loss in its log after the warm-up; expected some")
    steps_T, losses_T = (np.array(column) for column in zip(*found_T, strict=True))
    return Curve(series.name, np.array([record["learning_rate"] for record in log]), steps_T, losses_T, warmup)


def fit(kind: type[Law], curves: Sequence[Curve]) -> Law:
    """The law of this kind that is nearest to all curves at once, in their unit of rates.

    Raises UserError if no rate ever drops, and the law has parameters that only a drop determines.
    """
    names = ", ".join(curve.name for curve in curves)
    dropped = any(
        np.any(np.diff(c.rates_S[max(c.warmup - 1, 0) : c.steps_T[-1]]) < 0) for c in curves if len(c.steps_T)
    )
    if kind.annealing and not dropped:
        wanted = f"{' and '.join(kind.annealing)} of {kind.__name__}"
        raise UserError(
            f"{names}: the rate never drops, so that nothing determines {wanted}; expected a run with a decay"
        )
    peak = max(float(curve.rates_S.max()) for curve in curves)
    longest = max(int(curve.steps_T[-1]) for curve in curves)
    problem = _problem(kind, curves, peak, kind.bounds(longest))
    return _in_unit(kind(**problem.solve(kind.grid(longest))), 1 / peak)


def predict(law: Law, rates_S: np.ndarray, steps_T: np.ndarray, warmup: int = 0) -> np.ndarray:
    """float64 [T]: the loss in nats after each of `steps_T` updates (1 to S) of a run with these rates.

    Of a run whose first `warmup` changes of the rate are no drops, see `Curve`. Later rates change nothing.
    """
    rates_S, steps_T = np.asarray(rates_S, np.float64), np.asarray(steps_T)
    if len(steps_T) == 0 or steps_T.min() < 1 or steps_T.max() > len(rates_S) or rates_S[: steps_T.min()].sum() <= 0:
        raise UserError(f"steps to predict a loss at: expected from the first positive rate on, to {len(rates_S)}")
    with jax.enable_x64(True):
        schedule = law.prepare(rates_S, steps_T, warmup)
        return np.asarray(_losses(type(law), dataclasses.asdict(law), schedule), np.float64)


@partial(jax.jit, static_argnums=0)
def _losses(kind: type[Law], parameters: dict[str, Any], schedule: dict[str, jax.Array]) -> jax.Array:
    return kind(**parameters).loss(schedule)


def relative_errors(law: Law, curves: Sequence[Curve]) -> dict[str, float]:
    """Standard error of each parameter as a share of it; infinite for one that these curves do not determine."""
    return _problem(type(law), curves, 1.0, {}).relative_errors(dataclasses.asdict(law))


@dataclass(frozen=True)
class Score:
    """How well a law foretold a curve, nats."""

    end: float  # predicted - measured at the last loss
    mean: float  # mean of |predicted - measured| over all
    worst: float  # the largest |predicted - measured|


def score(law: Law, curve: Curve) -> Score:
    errors_T = predict(law, curve.rates_S, curve.steps_T, curve.warmup) - curve.losses_T
    return Score(float(errors_T[-1]), float(np.abs(errors_T).mean()), float(np.abs(errors_T).max()))


def _problem(
    kind: type[Law], curves: Sequence[Curve], peak: float, bounds: dict[str, tuple[float, float]]
) -> RobustFit:
    """With rates as shares of `peak`, so that one grid of starts serves any run."""
    schedules = [kind.prepare(np.asarray(c.rates_S, np.float64) / peak, c.steps_T, c.warmup) for c in curves]

    def losses(parameters: Any) -> jax.Array:
        law = kind(**parameters)
        return jnp.concatenate([law.loss(schedule) for schedule in schedules])

    names = [field.name for field in dataclasses.fields(kind)]
    return RobustFit(losses, names, kind.linear, np.concatenate([c.losses_T for c in curves]), bounds)


def _in_unit(law: Law, unit: float) -> Law:
    """The same law for rates that are counted in `unit`: what was 1 is 1 / unit."""
    if isinstance(law, ConvexBound):
        return dataclasses.replace(law, D2=law.D2 / unit, G2=law.G2 * unit)
    scaled: Any = {"A": law.A * unit**-law.alpha}
    if isinstance(law, Tissue):
        scaled |= {"C": law.C * unit}
    else:
        scaled |= {"B": law.B * unit, "C": law.C * unit ** (1 - law.gamma)}
    return dataclasses.replace(law, **scaled)
