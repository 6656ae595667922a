"""Learning-rate transfer: does the rate that is best for a small model stay the best one as the model grows?

A grid of learning rates at several sizes, each trial a whole warmup-stable-decay run, judged by its held-out loss (the
paper's Figure 3; Yang et al. 2203.03466). The optimum may move by one factor of two; what users pay is the regret: how
much worse the largest model does at the smallest one's best rate than at its own. Wider is better: at that rate no
model may be worse than a smaller one, at any step that was looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpmjax.model import mup
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import Row, aligned
from cpmjax.training.origin import Origin
from cpmjax.training.timeline import Timeline
from cpmjax.tunnel.faults import table_of
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.verdicts import Verdict
from cpmjax.tunnel.workbench import Moment, Workbench

SHIFT_BAR = 1.0  # factors of two that the optimum may move over the sizes
CONTROL_SHIFT = 2.0  # that it must at least move with `standard`, or the tunnel shows nothing
REGRET_BAR = 0.02  # nats per token
RISE_BAR = 0.01  # nats per token that a larger model may be worse


def make_trials(
    config: Config,
    axes: Sequence[Axis],
    names: Sequence[str],
    decay_modes: Sequence[str],
    rates: Sequence[float],
    seeds: int,
) -> list[Trial]:
    """A trial for each parametrisation, mode of the weight decay, size, learning rate and seed."""
    return [
        trial
        for name in names
        for mode in decay_modes
        for axis in axes
        for value in axis.values
        for rate in rates
        for seed in range(seeds)
        for trial in [_trial(config, name, mode, axis, value, rate, seed)]
    ]


def _trial(config: Config, name: str, mode: str, axis: Axis, value: int | str, rate: float, seed: int) -> Trial:
    labels = {"parametrisation": name, "weight_decay": mode, "axis": axis.name, axis.name: value}
    optimizer = replace(config.optimizer, learning_rate=rate, weight_decay_mode=mode)  # type: ignore[arg-type]
    if (mode == "independent") != (config.optimizer.weight_decay_mode == "independent"):
        # The modes agree on what is removed in a step at the base size and the experiment's own rate.
        _, removed = mup.per_step(config.optimizer, 1.0)
        decay = removed if mode == "independent" else removed / config.optimizer.learning_rate
        optimizer = replace(optimizer, weight_decay=decay)
    experiment = replace(
        config,
        run=replace(config.run, seed=seed),
        model=axis.model(config.model, value, name),
        optimizer=optimizer,
    )
    return Trial(labels | {"learning_rate": rate, "seed": seed}, experiment, table_of(name))


def measure(workbench: Workbench, trial: Trial) -> list[Row]:
    """A row for each evaluation of the experiment: step, training loss, held-out loss and bits per byte."""
    timeline = Timeline(trial.config, Origin({}))
    if not workbench.text(trial.config).held_out:
        raise UserError("data.held_out = 0: expected a share of held-out text, trials are judged by it")

    def observe(moment: Moment) -> Iterable[Row]:
        found = moment.program.evaluate(moment.parameters, moment.scales.multipliers)
        yield {"step": moment.step, "loss": moment.loss} | {
            key: found[key] for key in ("heldout_loss", "heldout_bits_per_byte")
        }

    return workbench.train(trial, filter(timeline.evaluates, range(1, timeline.total + 1)), observe)


@dataclass(frozen=True)
class Family:
    """The trials of one parametrisation and one mode of the weight decay along one axis.

    `losses` are held-out losses [steps, sizes, rates, seeds], infinite where a trial diverged.
    """

    parametrisation: str
    weight_decay: str
    axis: str
    steps: tuple[int, ...]
    sizes: tuple[int | str, ...]
    rates: tuple[float, ...]
    losses: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.parametrisation}, weight decay {self.weight_decay}, over {self.axis}"

    @property
    def final(self) -> np.ndarray:
        """Held-out loss at the end, mean over seeds [sizes, rates]."""
        return self.losses[-1].mean(axis=-1)

    @property
    def best(self) -> np.ndarray:
        """Index of each size's best rate."""
        return self.final.argmin(axis=-1)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate of some size is the first or last of the grid, so that a better one may lie beyond."""
        return bool(np.isin(self.best, (0, len(self.rates) - 1)).any())

    @property
    def shift(self) -> float:
        """Factors of two between the smallest model's best rate and the one furthest from it."""
        return float(np.abs(self._octaves()).max())

    @property
    def end_shift(self) -> float:
        """The same between the smallest and the largest model, with its sign."""
        return float(self._octaves()[-1])

    def _octaves(self) -> np.ndarray:
        octaves = np.log2(self.rates)[self.best]
        return np.round(octaves - octaves[0], 6)  # 0.01 and 0.02 are not quite a factor of two apart

    @property
    def regret(self) -> np.ndarray:
        """Of each seed: the largest model's loss at the smallest one's best rate, less its loss at its own."""
        largest = self.losses[-1, -1]
        return largest[self.best[0]] - largest[self.best[-1]]

    @property
    def rise(self) -> float:
        """The most that a model is worse than the next smaller one, at the smallest one's best rate, at any step."""
        at_rate = self.losses[:, :, self.best[0]].mean(axis=-1)
        return float(np.diff(at_rate, axis=1).max())

    @property
    def optima(self) -> np.ndarray:
        """Each size's best rate between the points of the grid: the vertex of a parabola through the best three."""
        found = []
        for losses, best in zip(self.final, self.best, strict=True):
            octave = float(np.log2(self.rates[best]))
            if 0 < best < len(self.rates) - 1 and np.isfinite(losses[best - 1 : best + 2]).all():
                a, b, _ = np.polyfit(np.log2(self.rates[best - 1 : best + 2]) - octave, losses[best - 1 : best + 2], 2)
                octave -= b / (2 * a) if a > 0 else 0.0
            found.append(2.0**octave)
        return np.array(found)


def families(rows: Iterable[Row]) -> list[Family]:
    """From the table of the trials. Sizes and seeds that have not ended yet are left out as a whole."""
    tables: dict[tuple, dict[tuple, float]] = defaultdict(dict)
    steps: dict[tuple, set[int]] = defaultdict(set)
    ended: dict[tuple, dict[tuple, str]] = defaultdict(dict)
    for row in rows:
        key = (row["parametrisation"], row["weight_decay"], row["axis"])
        place = (row[row["axis"]], row["learning_rate"], row["seed"])
        ended[key][place] = row["status"]
        if "step" in row:
            tables[key][row["step"], *place] = row["heldout_loss"]
            steps[key].add(row["step"])
    found = []
    for key, places in ended.items():
        sizes, rates, seeds = ([*dict.fromkeys(values)] for values in zip(*places, strict=True))
        rates = sorted(rates)
        at = sorted(steps[key]) or [0]  # none if every trial diverged before its first evaluation
        losses = np.full((len(at), len(sizes), len(rates), len(seeds)), math.inf)
        for index in np.ndindex(losses.shape):
            step, size, rate, seed = (axis[i] for axis, i in zip((at, sizes, rates, seeds), index, strict=True))
            losses[index] = tables[key].get((step, size, rate, seed), math.inf)
        found.append(Family(*key, tuple(at), tuple(sizes), tuple(rates), losses))
    return found


def verdicts(family: Family) -> list[Verdict]:
    """What a family was found to do. `standard` is the control: its optimum must move with the width."""
    if family.parametrisation == "standard" and family.axis != "layers":
        bar, moved = f">= {CONTROL_SHIFT:g} factors of two", family.end_shift
        return [Verdict(family.name, "the control's optimum moves", f"{moved:+g}", bar, abs(moved) >= CONTROL_SHIFT)]
    edge = ", at the edge of the grid" if family.at_edge else ""
    stays = family.shift <= SHIFT_BAR and not family.at_edge
    regret, spread = family.regret.mean(), f"(seeds {family.regret.min():+.4f} to {family.regret.max():+.4f})"
    found = [
        Verdict(family.name, "the optimum stays", f"{family.shift:g}{edge}", f"<= {SHIFT_BAR:g} factor of two", stays),
        Verdict(
            family.name, "regret", f"{regret:+.4f} {spread}", f"<= {REGRET_BAR:g} nats", bool(regret <= REGRET_BAR)
        ),
    ]
    if family.axis != "layers":
        criterion = f"wider is never worse, steps {', '.join(map(str, family.steps))}"
        passed = family.rise <= RISE_BAR
        found.append(Verdict(family.name, criterion, f"{family.rise:+.4f}", f"<= {RISE_BAR:g} nats", passed))
    return found


def describe(family: Family) -> str:
    """A line for each size: its best rate, on the grid and between its points, and the loss there with its spread;
    then what the smallest one's best rate costs the largest."""
    rows = [(family.axis, "best rate", "between the points", "held-out loss", "spread of the seeds")]
    for size, best, between, means, seeds in zip(
        family.sizes, family.best, family.optima, family.final, family.losses[-1], strict=True
    ):
        spread = f"{np.ptp(seeds[best]):.4f}"
        rows.append((str(size), f"{family.rates[best]:g}", f"{between:.4g}", f"{means[best]:.4f}", spread))
    cost = f"the best rate of {family.axis} {family.sizes[0]} costs {family.sizes[-1]} {family.regret.mean():.4f} nats"
    return f"{family.name}\n{aligned(rows)}\n{cost}"
