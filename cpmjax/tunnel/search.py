"""The search for MiniCPM's constants, and what it shows of them.

MiniCPM found scale_depth 1.4, scale_emb 12, init_std 0.1 and learning rate 0.01 in about 400 trials of Bayesian search
on its smallest model, 10 tokens a parameter each (2404.06395, appendix A.1). Here trial 0 is the experiment at its own
values and the others come from a sampler (`cpmjax.tunnel.search_workers`). The best of many noisy trials looks better
than it is: so the best few and the experiment's own values train again on seeds the search has not seen, paired by
seed. A bowl (`cpmjax.tunnel.search_bowl`) says where the optimum lies and how flat it is.

D the searched parameters, T trials of the search, S fresh seeds. Losses are held-out nats per token.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import Row, aligned
from cpmjax.tunnel.faults import table_of
from cpmjax.tunnel.search_bowl import Bowl, fit
from cpmjax.tunnel.search_workers import Ended, Taken
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.verdicts import Verdict

PARAMETERS = ("scale_depth", "scale_emb", "init_std", "learning_rate")
COST_BAR = 0.05  # nats that the experiment's own values may be worse than the best
FLAT = 0.02  # nats above the optimum that count as no worse

Values = Mapping[str, float]  # one of each parameter
Space = Mapping[str, tuple[float, float]]  # lowest and highest of each parameter


def own_values(config: Config, space: Space) -> dict[str, float]:
    """The experiment's own values, where the search begins. Raises UserError if its ranges leave one out."""
    model, rate = config.model, config.optimizer.learning_rate
    values = dict(zip(PARAMETERS, (model.scale_depth, model.scale_emb, model.init_std, rate), strict=True))
    for name, (low, high) in space.items():
        if not low <= values[name] <= high:
            flag = f"--{name.replace('_', '-')} = {low:g},{high:g}"
            raise UserError(f"{flag}: expected a range with the experiment's own {values[name]:g} in it")
    return values


def make_trial(config: Config, values: Values, seed: int, labels: Row) -> Trial:
    """The experiment at these values; its columns are the labels, the values and the seed."""
    experiment = replace(
        config,
        run=replace(config.run, seed=seed),
        model=replace(
            config.model,
            scale_depth=values["scale_depth"],
            scale_emb=values["scale_emb"],
            init_std=values["init_std"],
        ),
        optimizer=replace(config.optimizer, learning_rate=values["learning_rate"]),
    )
    return Trial(labels | dict(values) | {"seed": seed}, experiment, table_of(config.model.parametrisation))


def to_train(config: Config, taken: Taken, seeds: int) -> list[Trial]:
    """What one trial of the search trains: the experiment at its values, on seeds from the experiment's on."""
    labels = {"stage": "search", "number": taken.number}
    return [make_trial(config, taken.values, config.run.seed + seed, labels) for seed in range(seeds)]


def loss_of(outcomes: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a trial of the search: its held-out loss at the end, the mean over its seeds; infinite if one diverged, None
    if one failed."""
    if any(outcome["status"] == "failed" for outcome in outcomes):
        return None
    ends = [outcome["rows"][-1]["heldout_loss"] for outcome in outcomes if outcome["status"] == "finished"]
    return float(np.mean(ends)) if len(ends) == len(outcomes) and np.isfinite(ends).all() else math.inf


def searched(config: Config, ended: Sequence[Ended]) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials of the search and what each of them left."""
    found = []
    for each in ended:
        labels = {"stage": "search", "number": each.number, "worker": each.worker}
        for seed, outcome in enumerate(each.outcomes):
            found.append((make_trial(config, each.values, config.run.seed + seed, labels), outcome))
    return found


def confirming(config: Config, ended: Sequence[Ended], best: int, seeds: int, fresh: int) -> list[Trial]:
    """Trial 0 and the best of the search again, on `fresh` seeds that follow the `seeds` of the search."""
    losses = {each.number: loss_of(each.outcomes) for each in ended if each.whole}
    values = {each.number: each.values for each in ended}
    order = sorted((loss, number) for number, loss in losses.items() if number and math.isfinite(loss or 0.0))
    return [
        make_trial(config, values[number], config.run.seed + seed, {"stage": "confirmation", "number": number})
        for number in [0, *(number for _, number in order[:best])]
        for seed in range(seeds, seeds + fresh)
        if 0 in losses
    ]


def final_losses(rows: Iterable[Row], stage: str) -> dict[int, dict[int, float]]:
    """{number: {seed: held-out loss at the end}} of the trials that ended; infinite where one diverged."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["stage"] == stage and row["status"] != "failed":
            loss = row["heldout_loss"] if row["status"] == "finished" else math.inf
            # Rows come step by step: the last one stays.
            found[row["number"]][row["seed"]] = loss if math.isfinite(loss) else math.inf
    return dict(found)


@dataclass(frozen=True)
class Confirmed:
    """A trial of the search on fresh seeds, beside the experiment's own values on the same ones."""

    number: int
    searched: float  # its loss in the search
    losses_S: np.ndarray
    gains_S: np.ndarray  # how much lower than that of the own values, by seed

    @property
    def gain(self) -> tuple[float, float]:
        """Mean over the seeds, and half the width of its 95 % interval (Student's t of paired differences)."""
        gains, count = self.gains_S, len(self.gains_S)
        if not np.isfinite(gains).all():  # it diverged on a fresh seed, or the own values did
            return float(gains.mean()), math.inf
        half = float(stdtrit(count - 1, 0.975)) * gains.std(ddof=1) / math.sqrt(count)
        return float(gains.mean()), half


@dataclass(frozen=True)
class Findings:
    numbers_T: np.ndarray
    workers_T: np.ndarray
    values_TD: np.ndarray
    losses_T: np.ndarray  # mean over the seeds of the search; infinite where one diverged
    bounds_2D: np.ndarray  # lowest and highest value searched
    bowl: Bowl | None  # None if the trials are too few
    confirmed: tuple[Confirmed, ...]  # the own values first, then the best of the search in its order

    @property
    def own(self) -> np.ndarray:
        """Values of trial 0 [D]."""
        return self.values_TD[0]

    @property
    def best(self) -> int:
        """Index of the trial with the lowest loss of the search."""
        return int(self.losses_T.argmin())

    @property
    def rank(self) -> int:
        """Of trial 0 among the trials of the search; 1 is the best."""
        return 1 + int((self.losses_T < self.losses_T[0]).sum())

    @property
    def best_confirmed(self) -> Confirmed:
        """The one with the largest gain on fresh seeds; the own values themselves if none has any."""
        return max(self.confirmed, key=lambda each: each.gain[0])


def findings(rows: Sequence[Row], space: Space) -> Findings:
    """From the table. Raises UserError if trial 0 is not in it: everything is compared with it."""
    losses, again = final_losses(rows, "search"), final_losses(rows, "confirmation")
    if 0 not in losses:
        raise UserError("trial 0, the experiment's own values, has not ended; all others are compared with it")
    places = {row["number"]: row for row in rows if row["stage"] == "search"}
    numbers = sorted(losses)
    values = np.array([[places[number][name] for name in PARAMETERS] for number in numbers])
    means = {number: float(np.mean(list(losses[number].values()))) for number in numbers}
    losses_T = np.array([means[number] for number in numbers])
    confirmed = []
    for number in [number for number in again if again[number].keys() == again.get(0, {}).keys()]:
        mine, own = (np.array([again[each][seed] for seed in sorted(again[0])]) for each in (number, 0))
        gains = np.subtract(own, mine, out=np.zeros_like(own), where=np.isfinite(own) | np.isfinite(mine))
        confirmed.append(Confirmed(number, means[number], mine, gains))
    bounds = np.array([space[name] for name in PARAMETERS]).T
    return Findings(
        np.array(numbers),
        np.array([places[number]["worker"] for number in numbers]),
        values,
        losses_T,
        bounds,
        fit(values, losses_T, bounds),
        tuple(confirmed),
    )


def verdicts(found: Findings, asked: int) -> list[Verdict]:
    """Whether the search is whole, whether it found anything, and what the experiment's own values cost."""
    ended = len(found.numbers_T)
    judged = [Verdict("search", "every trial asked for has ended", str(ended), str(asked), ended >= asked)]
    if len(found.confirmed) > 1:
        gain, half = found.confirmed[1].gain
        measured, bar = f"gain {gain:+.4f} ± {half:.4f}", "not below 0 beyond its interval"
        judged.append(Verdict("the search's best", "holds on fresh seeds", measured, bar, bool(gain + half >= 0)))
        gain, half = found.best_confirmed.gain
        measured, bar = f"{gain:.4f} ± {half:.4f}", f"<= {COST_BAR:g} nats"
        criterion = "cost against the best on fresh seeds"
        judged.append(Verdict("the experiment's own values", criterion, measured, bar, bool(gain <= COST_BAR)))
    return judged


def describe(found: Findings, importance: Mapping[str, float]) -> str:
    """How the search went, where the optimum lies and how flat it is, and what became of the best on fresh seeds."""
    diverged = int(np.isinf(found.losses_T).sum())
    workers = len(set(found.workers_T.tolist()))
    lines = [
        f"{len(found.numbers_T)} trials by {workers} worker{'s' * (workers > 1)}, {diverged} diverged. Trial 0, the "
        f"experiment's own values: {found.losses_T[0]:.4f} nats, rank {found.rank}. Best: trial "
        f"{found.numbers_T[found.best]}, {found.losses_T[found.best]:.4f}",
        "",
        _parameters(found, importance),
        "",
    ]
    if found.bowl is not None:
        cost = float(np.diff(found.bowl(np.array([found.bowl.optimum_D, np.log2(found.own)])))[0])
        cost = float(np.diff(found.bowl(np.array([found.bowl.optimum_D, np.log2(found.own)])))[0])
        lines += [
            f"The bowl is a quadratic in the logarithms through the {found.bowl.trials} trials near the best, which "
            f"lie {found.bowl.residual:.4f} nats off it; its intervals hold 90 % of the optima of resampled trials.",
            f"On it the own values lie {cost:.4f} nats above the optimum.",
        ]
    lines.append(
        "Importance (PED-ANOVA): how much narrower than the searched range the best fifth of the trials lies, as a "
        "share of all parameters'."
    )
    return "\n".join(lines) + ("\n\n" + _confirmation(found) if len(found.confirmed) > 1 else "")


def _parameters(found: Findings, importance: Mapping[str, float]) -> str:
    bowl = found.bowl
    rows: list[tuple[str, ...]] = [
        ("parameter", "own", "best trial", "bowl's optimum", f"within {FLAT:g} nats", "factor of 2", "importance")
    ]
    for index, name in enumerate(PARAMETERS):
        surface = ("-", "-", "-")
        if bowl is not None:
            low, high = bowl.interval_2D[:, index]
            flat = bowl.flat_2D(FLAT)[:, index]
            surface = (
                f"{bowl.value_D[index]:.3g} ({low:.3g} to {high:.3g})",
                f"{flat[0]:.3g} to {flat[1]:.3g}",
                f"{bowl.octave_costs()[index]:+.4f}",
            )
        values = f"{found.own[index]:g}", f"{found.values_TD[found.best, index]:.3g}"
        rows.append((name, *values, *surface, f"{importance[name]:.2f}"))
    return aligned(rows)


def _confirmation(found: Findings) -> str:
    rows: list[tuple[str, ...]] = [
        ("trial", *PARAMETERS, "in the search", "fresh seeds", "gain on the own values (95 %)")
    ]
    for each in found.confirmed:
        index = int(np.flatnonzero(found.numbers_T == each.number)[0])
        gain, half = each.gain
        rows.append(
            (
                f"{each.number}{' (own)' * (each.number == 0)}",
                *(f"{value:.3g}" for value in found.values_TD[index]),
                f"{each.searched:.4f}",
                f"{each.losses_S.mean():.4f}",
                "" if each.number == 0 else f"{gain:+.4f} ± {half:.4f}",
            )
        )
    first, own = found.confirmed[1], found.confirmed[0]
    gained, (gain, half) = own.searched - first.searched, first.gain
    best, best_half = found.best_confirmed.gain
    lucky = "; the difference is luck that was chosen" * (gained > gain)
    return "\n".join(
        [
            aligned(rows),
            f"Trial {first.number} gained {gained:+.4f} nats on the own values where it was chosen, and {gain:+.4f} ± "
            f"{half:.4f} on {len(first.losses_S)} fresh seeds{lucky}.",
            f"The experiment's own values cost {best:.4f} ± {best_half:.4f} nats against the best of these "
            f"{len(found.confirmed)}, which was itself chosen on these seeds.",
        ]
    )
