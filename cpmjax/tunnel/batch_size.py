"""The batch-size law: with which batch does a loss cost the fewest tokens, and how does that batch grow as it falls?

Several sizes, several batches of each, all at one learning rate and on the same rows of text in the same order; the
held-out loss is looked at from the end of the warmup on. MiniCPM's paper (section 3.2) took whole cosines. Here the
rate stays at its peak, so that every point of a run is what a shorter run would have ended with; under a cosine it is
not. Beside the law stands what gradients say without a sweep: the noise scale, at a few moments of every run.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

import numpy as np

from cpmjax.analysis import batch_law
from cpmjax.analysis.batch_law import PAPER, BatchLaw, Curve, Minimum
from cpmjax.analysis.derivatives import Loss
from cpmjax.analysis.noise_scale import NoiseScale, noise_scale
from cpmjax.analysis.rows import Interval
from cpmjax.model.mup import PARAMETRISATIONS
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import Row, aligned
from cpmjax.training.origin import Origin
from cpmjax.training.timeline import Timeline
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.verdicts import Verdict
from cpmjax.tunnel.workbench import Moment, Workbench

Seeds = Sequence[int] | np.ndarray

POINTS = 25  # of a run at which its held-out loss is looked at: in equal ratios from the end of the warmup
NOISE_EVERY = 6  # points between two measurements of the noise scale
NOISE_ROWS = 128
GROWTH_BAR = 0.5  # p of L^-p that must be surpassed: parabolas make up to 0.1 of a batch that stays
INSIDE_BAR = 0.5  # share of the levels that must have their best batch inside of those measured


def make_trials(config: Config, axis: Axis, batches: Sequence[int], rate_power: float, seeds: int) -> list[Trial]:
    """A trial for each size, batch (in rows) and seed. The learning rate grows as batch^rate_power, from the
    experiment's own at its own batch. Raises UserError unless the schedule counts tokens."""
    if config.schedule.unit != "tokens":
        raise UserError("schedule.unit = steps: expected tokens, so that every batch sees as much text")
    trials = []
    kinds = [(value, rows) for value in axis.values for rows in batches]
    for seed, (value, rows) in itertools.product(range(seeds), kinds):  # a study that was stopped has whole seeds
        rate = config.optimizer.learning_rate * (rows / config.training.batch_size) ** rate_power
        experiment = replace(
            config,
            run=replace(config.run, seed=seed),
            model=axis.model(config.model, value, config.model.parametrisation),
            optimizer=replace(config.optimizer, learning_rate=rate),
            training=replace(config.training, batch_size=rows),
        )
        labels = {"axis": axis.name, axis.name: value, "batch": rows * config.data.sequence_length}
        table = PARAMETRISATIONS[config.model.parametrisation]
        trials.append(Trial(labels | {"learning_rate": rate, "seed": seed}, experiment, table))
    return trials


def observed(config: Config) -> list[int]:
    """The steps at which a trial is looked at."""
    schedule, batches = config.schedule, config.batches
    total = batches.tokens(schedule.in_steps(batches).total)
    first = max(getattr(schedule, "warmup", 0), batches.tokens(1))
    return sorted({batches.steps(round(tokens)) for tokens in np.geomspace(first, total, POINTS)})


def measure(workbench: Workbench, trial: Trial) -> list[Row]:
    """A row for each point: step, tokens, training and held-out loss; at some of them |G|^2 and S of the gradient, with
    their errors, on the rows that the run would read after its end."""
    config, timeline, text = trial.config, Timeline(trial.config, Origin({})), workbench.text(trial.config)
    if not text.held_out:
        raise UserError("data.held_out = 0: expected a share of held-out text, trials are judged by it")
    steps = observed(config)
    noisy = set(steps[NOISE_EVERY::NOISE_EVERY])
    loss, unread = Loss(config.model, config.compute), text.batches(timeline.position(timeline.total), NOISE_ROWS)
    counted = float(unread["weights"].sum(axis=1).mean())

    def observe(moment: Moment) -> Iterable[Row]:
        found = moment.program.evaluate(moment.parameters, moment.scales.multipliers)
        row = {"step": moment.step, "tokens": timeline.tokens(moment.step), "loss": moment.loss}
        row |= {key: found[key] for key in ("heldout_loss", "heldout_bits_per_byte")}
        if moment.step in noisy:
            gradient = asdict(noise_scale(loss, moment.parameters, unread, counted))
            row |= {f"gradient_{key}": value for key, value in gradient.items()}
        yield row

    return workbench.train(trial, steps, observe)


@dataclass(frozen=True)
class Runs:
    """The trials of one size: for each batch, in tokens, when it was looked at [T] and its losses [S, T].

    Losses are held-out nats per token, infinite from where a trial diverged. `noise` has the means over chosen seeds.
    """

    axis: str
    size: int | str
    batches_B: np.ndarray
    tokens: tuple[np.ndarray, ...]
    losses: tuple[np.ndarray, ...]
    gradients: dict[tuple[int, int], list[tuple[float, NoiseScale]]]  # by batch and tokens: a seed's loss, and its own

    @property
    def name(self) -> str:
        return f"{self.axis} {self.size}"

    @property
    def seeds(self) -> int:
        return len(self.losses[0])

    def curves(self, seeds: Seeds | None = None) -> list[Curve]:
        """Loss over tokens of each batch, mean over seeds: all of them, unless some are given."""
        chosen = slice(None) if seeds is None else seeds
        return [
            (tokens_T, losses_ST[chosen].mean(axis=0))
            for tokens_T, losses_ST in zip(self.tokens, self.losses, strict=True)
        ]

    def minima(self, seeds: Seeds | None = None) -> list[Minimum | None]:
        """The best batch of each level of the loss."""
        return batch_law.minima(self.batches_B, self.curves(seeds))

    def noise(self, seeds: Seeds | None = None) -> list[tuple[int, float, NoiseScale]]:
        """(batch, held-out loss, noise scale) at each moment; |G|^2, S and the loss are means over seeds."""
        found = []
        for (batch, _), each in self.gradients.items():
            chosen = [each[seed] for seed in (range(len(each)) if seeds is None else seeds) if seed < len(each)]
            if chosen:
                parts = np.array([[noise.signal, noise.noise, noise.tokens] for _, noise in chosen]).mean(axis=0)
                errors = np.array([[noise.signal_error, noise.noise_error] for _, noise in chosen])
                errors = np.sqrt((errors**2).sum(axis=0)) / len(chosen)
                loss = float(np.mean([loss for loss, _ in chosen]))
                found.append((batch, loss, NoiseScale(*map(float, (parts[0], parts[1], *errors, parts[2])))))
        return found


def sizes(rows: Iterable[Row]) -> list[Runs]:
    """From the table of the trials. A seed that diverged has infinite losses from there on."""
    losses: dict[tuple, dict[tuple[int, int, int], float]] = defaultdict(dict)  # by batch, tokens and seed
    gradients: dict[tuple, dict[tuple[int, int], list[tuple[float, NoiseScale]]]] = defaultdict(dict)
    seeds: dict[tuple, set[int]] = defaultdict(set)
    names = [field.name for field in fields(NoiseScale)]
    for row in rows:
        if row["status"] == "failed":
            continue
        key = (row["axis"], row[row["axis"]])
        seeds[key].add(row["seed"])
        if "tokens" in row:
            losses[key][row["batch"], row["tokens"], row["seed"]] = row["heldout_loss"]
        if "gradient_signal" in row:
            noise = NoiseScale(**{name: row[f"gradient_{name}"] for name in names})
            gradients[key].setdefault((row["batch"], row["tokens"]), []).append((row["heldout_loss"], noise))
    found = []
    for key, table in losses.items():
        batches = sorted({batch for batch, _, _ in table})
        tokens = [sorted({at for batch, at, _ in table if batch == each}) for each in batches]
        losses_ST = [
            np.array([[table.get((batch, at, seed), np.inf) for at in each] for seed in sorted(seeds[key])])
            for batch, each in zip(batches, tokens, strict=True)
        ]
        tokens_T = tuple(np.array(each, float) for each in tokens)
        found.append(Runs(*key, np.array(batches, float), tokens_T, tuple(losses_ST), gradients[key]))
    return found


@dataclass(frozen=True)
class Found:
    """What the runs of all sizes say together. The noise scale has a law of the same form as the best batch."""

    runs: list[Runs]

    @property
    def seeds(self) -> int:
        return min(runs.seeds for runs in self.runs)

    def law(self, seeds: Seeds | None = None) -> BatchLaw:
        """Of the best batch: through the minima of all sizes."""
        found = [minimum for runs in self.runs for minimum in runs.minima(seeds) if minimum]
        return batch_law.fit([minimum.loss for minimum in found], [minimum.batch for minimum in found])

    def noise(self, seeds: Seeds | None = None) -> BatchLaw:
        """Of the noise scale, within runs: at one loss it is larger in those of a larger batch, so that each size and
        batch has its own A, of which this has the mean."""
        found = [((runs.size, batch), loss, n.batch) for runs in self.runs for batch, loss, n in runs.noise(seeds)]
        seen = [each for each in found if np.isfinite(each[2])]
        return batch_law.fit(
            [loss for _, loss, _ in seen], [scale for _, _, scale in seen], [run for run, _, _ in seen]
        )

    @cached_property
    def p(self) -> Interval:
        return batch_law.over_seeds(lambda seeds: self.law(seeds).p, self.seeds)

    @cached_property
    def noise_p(self) -> Interval:
        return batch_law.over_seeds(lambda seeds: self.noise(seeds).p, self.seeds)

    @cached_property
    def minima(self) -> list[list[Minimum | None]]:
        """The best batch of each level of the loss, for each size."""
        return [runs.minima() for runs in self.runs]

    @property
    def inside(self) -> list[Minimum]:
        """Those that lie inside of the batches that were measured."""
        return [minimum for minima in self.minima for minimum in minima if minimum]

    @property
    def apart(self) -> list[float]:
        """For each level at which two sizes or more have a best batch: the largest over the smallest."""
        shared = defaultdict(list)
        for minimum in self.inside:
            shared[round(minimum.loss, 6)].append(minimum.batch)
        return [max(each) / min(each) for each in shared.values() if len(each) > 1]


def verdicts(found: Found) -> list[Verdict]:
    inside, every = len(found.inside), sum(map(len, found.minima))
    most, bar = f">= {INSIDE_BAR:.0%} of the levels", f"p > {GROWTH_BAR:g}"
    return [
        Verdict(
            "best batch",
            "lies inside of those measured",
            f"{inside} of {every}",
            most,
            inside >= INSIDE_BAR * every > 0,
        ),
        Verdict(
            "best batch", "grows as the loss falls", f"L^-p, p = {found.p:.2f}", bar, bool(found.p.low > GROWTH_BAR)
        ),
        Verdict(
            "noise scale",
            "grows as the loss of a run falls",
            f"L^-p, p = {found.noise_p:.2f}",
            bar,
            bool(found.noise_p.low > GROWTH_BAR),
        ),
    ]


def describe(found: Found) -> str:
    """A line for each size, then the law beside the paper's and the noise scale, and how much a wrong batch costs."""
    table: list[tuple[str, ...]] = [
        ("size", "levels", "inside", "from loss", "best batch", "to loss", "best batch", "p of its own")
    ]
    for each, minima in zip(found.runs, found.minima, strict=True):
        inside = [minimum for minimum in minima if minimum]
        ends = [text for m in inside[:: max(1, len(inside) - 1)][:2] for text in (f"{m.loss:.2f}", f"{m.batch:,.0f}")]
        own = batch_law.fit([m.loss for m in inside], [m.batch for m in inside]).p
        table.append((each.name, str(len(minima)), str(len(inside)), *(ends + ["-"] * 4)[:4], f"{own:.1f}"))
    law, noise, inside = found.law(), found.noise(), found.inside
    lines = [
        aligned(table),
        "best batch in tokens, loss in held-out nats per token; levels are 2 % of the loss apart\n",
        f"best batch   {law.A:.3g} / L^{law.p:.2f} tokens, p {found.p:.2f}",
        f"noise scale  {noise.A:.3g} / L^{noise.p:.2f} tokens, p {found.noise_p:.2f}, within runs",
        f"the paper    {PAPER.A:.3g} / L^{PAPER.p:.2f} tokens; L of C4, vocabulary 122,753: only p compares",
        f"intervals: jackknife over {found.seeds} seeds, 95 % by Student's t",
    ]
    if inside:
        off = np.expm1(np.median([minimum.curvature for minimum in inside]) / 2 * np.log([2.0, 4.0]) ** 2)
        ratio = np.median([minimum.batch / noise.batch(minimum.loss) for minimum in inside])
        lines += [
            f"a batch twice off the best costs {off[0]:.0%} more tokens, four times off {off[1]:.0%} (median level)",
            f"the best batch is {ratio:.2g} times the noise scale at the same loss (median level)",
        ]
    if found.apart:
        lines.append(
            f"sizes at the same loss: best batches within a factor of {np.median(found.apart):.2f} (median), "
            f"{max(found.apart):.2f} (most), over {len(found.apart)} levels"
        )
    return "\n".join(lines)
