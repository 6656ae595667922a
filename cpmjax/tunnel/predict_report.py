"""What `predict` found: how far each prediction was off, beside what needs no law, and the public numbers.

Errors are foretold - measured at the end of a run, in nats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cpmjax.analysis import public_curves
from cpmjax.analysis.decay_prediction import LAWS, Law, predict
from cpmjax.analysis.multi_power import MultiPower
from cpmjax.run.table import Row, aligned
from cpmjax.tunnel.paired import t_interval
from cpmjax.tunnel.predict import COSINE, EARLY, METHODS, NO_DECAY, SAME_DROP, TRUNK, Fit, undetermined
from cpmjax.tunnel.verdicts import Verdict

ERROR_BAR = 0.03  # nats: the multi-power law at the end of a WSD run
DIGITS_BAR = 5e-5  # nats: what four digits leave open
_MEAN_BAR, _R2_BAR = 5e-6, 5e-5  # the same of the published means over curves


def errors(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[int, float]]:
    """{(fit set, law, run): {seed: error}}"""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["fit_set"], row["law"], row["run"]][row["seed"]] = row["error"]
    return dict(found)


def sizes(rows: Sequence[Row], fit_set: str, law: str) -> dict[int, float]:
    """{seed: mean |error| over the branches of the trunk that were not seen}; empty for a law without a prediction."""
    mine = [row for row in rows if row["fit_set"] == fit_set]
    branches = {row["run"] for row in mine if row["law"] == NO_DECAY}
    found: dict[int, list[float]] = defaultdict(list)
    for row in mine:
        if row["law"] == law and row["run"] in branches:
            found[row["seed"]].append(abs(row["error"]))
    return {seed: float(np.mean(values)) for seed, values in found.items()}


def describe(rows: Sequence[Row], fit_set: str) -> str:
    """Of one fit set: the mean error of each law at the end of each run, the mean |error|, and that less no law's."""
    at = {key[1:]: values for key, values in errors(rows).items() if key[0] == fit_set}
    table = [("foretold - measured", *METHODS)]
    for run in dict.fromkeys(run for _, run in at):
        found = [at.get((method, run)) for method in METHODS]
        table.append((run, *("-" if each is None else f"{np.mean([*each.values()]):+.3f}" for each in found)))
    size = {method: np.array([*sizes(rows, fit_set, method).values()]) for method in METHODS}
    plain = SAME_DROP if len(size[SAME_DROP]) else NO_DECAY
    less = {kind.__name__: size[kind.__name__] - size[plain] for kind in LAWS if len(size[kind.__name__])}
    table.append(("mean |error| of branches", *(_shown(size[method]) for method in METHODS)))
    table.append((f"less that of {plain}", *(_shown(less[each], "+") if each in less else "-" for each in METHODS)))
    said = [f"{law} is {_beside(difference)} {plain}" for law, difference in less.items()]
    return f"{aligned(table)}\n{'; '.join(said)}."


def _shown(values: np.ndarray, sign: str = "") -> str:
    if not len(values):
        return "-"
    found = t_interval(values)
    return f"{found.value:{sign}.3f}" + (f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]" if len(values) > 1 else "")


def _beside(less: np.ndarray) -> str:
    """How a law compares whose errors are larger by `less`, for each seed."""
    interval = t_interval(less)
    return "better than" if interval.high < 0 else "worse than" if interval.low > 0 else "not told apart from"


def remarks(solved: Sequence[tuple[Fit, Law | None]]) -> str:
    """What the tables are means of, and how noisy the trunk is."""
    seeds, around = len({fit.seed for fit, _ in solved}), t_interval(np.array(_wobbles(solved)))
    return (
        f"Held-out nats per token at the end of runs that were not seen, means over {seeds} seed(s); [low, high] are\n"
        "t intervals of 95 % over seeds, of differences paired. Around its own fit the trunk goes up and down by\n"
        f"{around.value:.3f} (standard deviation in its second half), which {NO_DECAY} and {SAME_DROP} take from it."
    )


def _wobbles(solved: Iterable[tuple[Fit, Law | None]]) -> list[float]:
    """For each seed, the standard deviation of the trunk's losses, in its second half, around a fit with a decay."""
    found = {}
    for fit, law in solved:
        if law is not None and fit.kind is LAWS[0]:
            trunk = fit.known[0].after(len(fit.known[0].rates_S) // 2)
            found[fit.seed] = float(np.std(trunk.losses_T - predict(law, trunk.rates_S, trunk.steps_T, trunk.warmup)))
    return [*found.values()]


def trunk_verdicts(solved: Sequence[tuple[Fit, Law | None]]) -> list[Verdict]:
    """Whether a trunk alone says nothing of the annealing terms: the fit refuses, and their errors are infinite."""
    found = []
    for kind in (kind for kind in LAWS if kind.annealing):
        mine = [(fit, law) for fit, law in solved if fit.kind is kind]
        refused = all(law is None for fit, law in mine if fit.fit_set == TRUNK)
        # Of each seed's last fit, the one with most runs.
        laws = {fit.seed: (law, fit.known[0]) for fit, law in mine if law is not None}
        free = set(kind.annealing).intersection(*(undetermined(law, trunk) for law, trunk in laws.values()))
        wanted, said = ", ".join(kind.annealing), ", ".join(name for name in kind.annealing if name in free)
        passed = refused and said == wanted
        said += "" if refused else ", but the fit goes on"
        found.append(Verdict(kind.__name__, "what a trunk alone does not determine", said, wanted, passed))
    return found


def wsd_verdicts(rows: Sequence[Row], wsd: str) -> list[Verdict]:
    """Of the multi-power law at the end of the run `wsd`, which it had not seen; none if no early decay was there."""
    at = errors(rows)
    taught = next((each for each in (COSINE, EARLY) if (each, MultiPower.__name__, wsd) in at), None)
    if taught is None:
        return []
    off = [*at[taught, MultiPower.__name__, wsd].values()]
    size, criterion = float(np.mean(np.abs(off))), f"mean |error| at the end of {wsd}, fitted on {taught}"
    measured = f"{size:.4f} (seeds {min(off):+.4f} to {max(off):+.4f})"
    return [Verdict(MultiPower.__name__, criterion, measured, f"<= {ERROR_BAR} nats", size <= ERROR_BAR)]


# The public curves.


def public_finals() -> list[Row]:
    """What the published parameters say of the last losses of the public curves that stand in `public_curves`."""
    found = []
    for size, law in public_curves.FITTED.items():
        for run, (updates, measured) in public_curves.LAST[size].items():
            told = float(predict(law, public_curves.rates(run), np.array([updates]))[0])
            row = {"size": size, "run": run, "predicted": told, "measured": measured, "error": told - measured}
            found.append(row | ({"published": public_curves.LAST_OF_WSD[size]} if run == public_curves.WSD else {}))
    return found


def public_scores(folder: str | Path) -> list[Row]:
    """Mean |error| and R2 of the published parameters, over each of the public curves that they were not fitted to."""
    found = []
    for size, law in public_curves.FITTED.items():
        curves = public_curves.read(folder, size)
        for run in public_curves.NOT_SEEN:
            curve = curves[run]
            errors_T = predict(law, curve.rates_S, curve.steps_T, curve.warmup) - curve.losses_T
            row = {"size": size, "run": run, "mean_abs_error": float(np.abs(errors_T).mean())}
            found.append(row | {"r2": float(1 - np.mean(errors_T**2) / np.var(curve.losses_T))})
    return found


def describe_public(rows: Sequence[Row]) -> str:
    table = [("million parameters", "run", "foretold", "published", "measured", "foretold - measured")]
    for row in rows:
        published = f"{row['published']:.4f}" if "published" in row else ""
        cells = f"{row['predicted']:.4f}", published, f"{row['measured']:.4f}", f"{row['error']:+.4f}"
        table.append((str(row["size"]), row["run"], *cells))
    return aligned(table)


def public_verdicts(finals: Sequence[Row], scored: Sequence[Row]) -> list[Verdict]:
    """Whether our code says of the public curves what was published; `scored` may be empty."""
    found = []
    for size in public_curves.FITTED:
        mine = [row for row in finals if row["size"] == size and "published" in row]
        off = max(abs(row["predicted"] - row["published"]) for row in mine)
        said, bar = (
            ", ".join(f"{row['predicted']:.4f}" for row in mine),
            ", ".join(str(row["published"]) for row in mine),
        )
        criterion = f"published parameters at the end of {public_curves.WSD}"
        found.append(Verdict(f"public {size}M", criterion, said, bar, off < DIGITS_BAR))
        mine = [row for row in scored if row["size"] == size]
        if mine:
            error = float(np.mean([row["mean_abs_error"] for row in mine]))
            r2 = float(np.mean([row["r2"] for row in mine]))
            wanted, share = public_curves.MEAN_ERRORS[size], public_curves.R2[size]
            same = abs(error - wanted) < _MEAN_BAR and abs(r2 - share) < _R2_BAR
            said = f"{error:.5f}, R2 {r2:.4f}"
            criterion = f"mean |error| over the {len(mine)} curves not seen"
            found.append(Verdict(f"public {size}M", criterion, said, f"{wanted:.5f}, R2 {share:.4f}", same))
    return found
