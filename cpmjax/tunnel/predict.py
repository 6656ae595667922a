"""Do laws of the learning rate, fitted on some runs of a trunk, foretell the others?

On the runs of `study schedules` that share one peak: a constant trunk, decays from it of several lengths and shapes,
one from a decayed model, and a cosine. A law is fitted for each seed on the runs of a fit set, and scored on those that
are not in it. Beside the laws stand two predictions without any: that a decay brings nothing, and that it brings what
those of the fit set brought on average below the trunk, at the step where they ended.

S updates, T losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from cpmjax.analysis.decay_prediction import LAWS, Curve, Law, fit, predict, relative_errors
from cpmjax.run.errors import UserError
from cpmjax.run.table import Row

TRUNK, SHORT, LONG, EARLY, COSINE = (
    "trunk",
    "trunk, shortest decay",
    "trunk, longest decay",
    "trunk, early decays",
    "trunk, early decays, cosine",
)
NO_DECAY, SAME_DROP = "no decay", "same drop"  # what needs no law
METHODS = (NO_DECAY, SAME_DROP, *(kind.__name__ for kind in LAWS))

_LEFT_OUT = 0.1  # of the trunk: no law is about the first tenth
_EARLY = 0.6  # of the trunk: where an early decay has ended at the latest


@dataclass(frozen=True)
class Fit:
    """A law to be fitted for one seed, and what it is then asked to foretell; `known` begins with the trunk."""

    fit_set: str
    seed: int
    kind: type[Law]
    known: tuple[Curve, ...]
    targets: tuple[Curve, ...]

    @property
    def labels(self) -> Row:
        return {"fit_set": self.fit_set, "seed": self.seed, "law": self.kind.__name__}

    @property
    def identity(self) -> str:
        """12 hexadecimal digits that stand for all that the law depends on."""
        parts = [self.kind.__name__, jax.__version__]
        for curve in self.known:
            parts += [array.tobytes().hex() for array in (curve.rates_S, curve.steps_T, curve.losses_T)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]

    def solve(self) -> Law | None:
        """None if the runs do not determine the law."""
        try:
            return fit(self.kind, self.known)
        except UserError:
            return None


# The runs, by what their rates do.


def begins(curve: Curve) -> int:
    """The updates before the rate drops for the first time; all of them if it never does."""
    dropping = np.flatnonzero(np.diff(curve.rates_S) < 0)
    return int(dropping[0]) + 1 if len(dropping) else len(curve.rates_S)


def constant(curve: Curve) -> bool:
    return begins(curve) == len(curve.rates_S)


def one_peak(curves: Iterable[Curve]) -> dict[str, Curve]:
    """Of one seed: the trunk first, which is the constant run at the peak that most have, and all others of its peak.

    The first tenth of the trunk is left out, and what a branch has in common with it is told by the trunk alone. Raises
    UserError if no rate is constant.
    """
    at_peak: dict[str, list[Curve]] = defaultdict(list)
    for curve in curves:
        at_peak[f"{curve.rates_S.max():.6g}"].append(curve)
    peers = max((each for each in at_peak.values() if any(map(constant, each))), key=len, default=[])
    if not peers:
        raise UserError("the schedules: none is constant after its warm-up; expected a trunk at the peak of its decays")
    trunk = next(filter(constant, peers))
    first = round(_LEFT_OUT * len(trunk.rates_S))
    found = {trunk.name: trunk.after(first)}
    for curve in peers:
        own = curve.after(max(begins(curve), first))
        if not constant(curve) and len(own.steps_T) and np.isfinite(own.losses_T).all():
            found[curve.name] = own
    return found


def fit_sets(curves: Mapping[str, Curve]) -> dict[str, list[str]]:
    """The names of the runs in each fit set, of those that `one_peak` found. Raises UserError without a decay."""
    trunk, *others = curves.values()
    total = len(trunk.rates_S)
    branches = [curve.name for curve in others if begins(curve) > curve.warmup]
    cosines = [curve.name for curve in others if curve.name not in branches and len(curve.rates_S) == total]
    early = [name for name in branches if len(curves[name].rates_S) <= _EARLY * total]
    decays = sorted(_whole(curves), key=lambda name: total - begins(curves[name]))
    if not decays:
        raise UserError(f"{', '.join(curves)}: expected a decay that ends where {trunk.name} ends")
    found = {TRUNK: [trunk.name], SHORT: [trunk.name, decays[0]]}
    longest = begins(curves[decays[-1]])
    if longest < begins(curves[decays[0]]):
        found[LONG] = [trunk.name, next(name for name in decays if begins(curves[name]) == longest)]
    if early:
        found[EARLY] = [trunk.name, *early]
    if early and cosines:
        found[COSINE] = [trunk.name, *early, cosines[0]]
    return found


def judged(curves: Mapping[str, Curve]) -> str:
    """The run that stands for WSD: of those that decay once, to the trunk's end, the first of nearly a tenth."""
    total = len(next(iter(curves.values())).rates_S)
    return min(_whole(curves), key=lambda name: abs(total - begins(curves[name]) - total / 10))


def _whole(curves: Mapping[str, Curve]) -> list[str]:
    """Those that leave the trunk and decay once, to its end."""
    trunk, *others = curves.values()
    return [
        curve.name
        for curve in others
        if len(curve.rates_S) == len(trunk.rates_S)
        and begins(curve) > curve.warmup
        and np.all(np.diff(curve.rates_S[curve.warmup :]) <= 0)
    ]


def make_fits(runs: Mapping[int, Mapping[str, Curve]]) -> list[Fit]:
    """A fit of each law on each set for each seed; `runs` is {seed: {name: curve}} as `one_peak` gives them."""
    return [
        Fit(fit_set, seed, kind, tuple(curves[name] for name in known), targets)
        for seed, curves in runs.items()
        for fit_set, known in fit_sets(curves).items()
        for targets in [tuple(curve for name, curve in curves.items() if name not in known)]
        for kind in LAWS
    ]


# What they foretell.


def scores(fit: Fit, law: Law | None) -> list[Row]:
    """For each run that was not seen: its last loss as foretold and as measured, and the mean |error| over its decay.

    With the first of the laws also what needs none of them, of runs that leave the trunk. A law that was not determined
    has no rows.
    """
    found = []
    trunk, *decays = fit.known
    drops = [_of_trunk(trunk, decay) - decay.losses_T[-1] for decay in decays if begins(decay) > decay.warmup]
    for target in fit.targets:
        measured = float(target.losses_T[-1])
        foretold: dict[str, tuple[float, float | None]] = {}
        if fit.kind is LAWS[0] and begins(target) > target.warmup:
            foretold[NO_DECAY] = _of_trunk(trunk, target), None
            if drops:
                foretold[SAME_DROP] = _of_trunk(trunk, target) - float(np.mean(drops)), None
        if law is not None:
            told_T = predict(law, target.rates_S, target.steps_T, target.warmup)
            foretold[fit.kind.__name__] = float(told_T[-1]), float(np.abs(told_T - target.losses_T).mean())
        for name, (last, over_decay) in foretold.items():
            row = fit.labels | {"law": name, "run": target.name, "step": int(target.steps_T[-1])}
            row |= {"predicted": last, "measured": measured, "error": last - measured}
            found.append(row | ({} if over_decay is None else {"mean_abs_error_of_decay": over_decay}))
    return found


def _of_trunk(trunk: Curve, other: Curve) -> float:
    """The loss of the trunk where another run ends."""
    return float(np.interp(other.steps_T[-1], trunk.steps_T, trunk.losses_T))


def parameters(fit: Fit, law: Law | None) -> list[Row]:
    """Each constant of a law with its relative standard error, infinite where its runs do not determine it."""
    if law is None:
        return []
    errors = relative_errors(law, fit.known)
    values = dataclasses.asdict(law)
    return [fit.labels | {"parameter": key, "value": values[key], "relative_error": errors[key]} for key in values]


def losses(fit: Fit, law: Law | None) -> list[Row]:
    """Every loss of the runs that were not seen, as foretold and as measured, five decimals."""
    if law is None:
        return []
    return [
        fit.labels | {"run": target.name, "step": int(step), "measured": round(loss, 5), "predicted": round(told, 5)}
        for target in fit.targets
        for step, loss, told in zip(
            target.steps_T,
            target.losses_T.tolist(),
            predict(law, target.rates_S, target.steps_T, target.warmup).tolist(),
            strict=True,
        )
    ]


def undetermined(law: Law, trunk: Curve) -> list[str]:
    """The constants of a law that a trunk alone says nothing of."""
    return [name for name, error in relative_errors(law, [trunk]).items() if np.isinf(error)]
