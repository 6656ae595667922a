"""A scaling law at linear cost: of each size one run at the peak rate, and a decay from it to each amount of data.

A point of a scaling law is the loss at the end of a whole schedule. With a cosine each amount of data needs a run of
its own; with WSD (Hu et al. 2404.06395, section 4.5) all amounts of one size share a trunk, and only their decays are
trained beside it. The paper ends its branches at 10 to 60 tokens a parameter, so that its large models are the ones
with much data; here all sizes end at the same amounts, which keeps size and data apart.

S sizes, E amounts of data (ends of branches), R seeds, T trained models in one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cpmjax.model.parameters import count
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD, Constant, Schedule
from cpmjax.run.table import Row
from cpmjax.tunnel.faults import table_of
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Trial
from cpmjax.tunnel.workbench import Moment, Workbench


def schedules(config: Config, ends: Sequence[float]) -> list[WSD]:
    """A whole schedule, in steps, for each end: that share of the experiment's length, with the same share of it in
    the decay, after the same warmup.

    Raises UserError if the experiment has another kind of schedule, or no room for one of them.
    """
    whole = config.schedule
    if not isinstance(whole, WSD):
        kind = Schedule.get_choice_name(type(whole))
        raise UserError(f"schedule.type = {kind}: expected wsd, whose stable stage the branches leave")
    whole = whole.in_steps(config.batches)
    found = []
    for end in ends:
        length = round(end * whole.total)
        decay = round(length * whole.decay / whole.total)
        stable = length - decay - whole.warmup
        if decay < 1 or stable < 0:
            raise UserError(
                f"--ends: {end:g} of {whole.total} steps: expected at least one step of decay, after the "
                f"{whole.warmup} of the warmup"
            )
        half_life = whole.half_life and whole.half_life * decay / whole.decay
        found.append(replace(whole, stable=stable, decay=decay, half_life=half_life))
    return found


def make_trials(config: Config, axis: Axis, ends: Sequence[float], seeds: int) -> list[Trial]:
    """For each size and seed the trunk, to where its last branch leaves it, and a branch to each end."""
    planned = schedules(config, ends)
    return [
        trial for value in axis.values for seed in range(seeds) for trial in _line(config, axis, value, planned, seed)
    ]


def _line(config: Config, axis: Axis, value: int | str, planned: Sequence[WSD], seed: int) -> list[Trial]:
    name = config.model.parametrisation
    model = axis.model(config.model, value, name)
    experiment, table = replace(config, run=replace(config.run, seed=seed), model=model), table_of(name)
    labels = {"axis": axis.name, axis.name: value, "parameters": count(model, embeddings=False), "seed": seed}
    leaves = [schedule.warmup + schedule.stable for schedule in planned]
    stable = Constant(planned[0].warmup, max(leaves) - planned[0].warmup)
    trunk = Trial(
        labels | {"part": "trunk", "after": 0}, replace(experiment, schedule=stable), table, keep=tuple(sorted(leaves))
    )
    branches = [
        Trial(labels | {"part": "branch", "after": after}, replace(experiment, schedule=schedule), table, trunk, after)
        for after, schedule in zip(leaves, planned, strict=True)
    ]
    return [trunk, *branches]


def measure(workbench: Workbench, trial: Trial) -> list[Row]:
    """A row at the end of a branch, and one wherever a branch leaves the trunk: step, tokens and epochs read by then
    (of the corpus read most often), training loss, held-out loss and bits per byte."""
    text, batches = workbench.text(trial.config), trial.config.batches
    if not text.held_out:
        raise UserError("data.held_out = 0: expected a share of held-out text, trials are judged by it")

    def observe(moment: Moment) -> Iterable[Row]:
        read = text.mixture.counts(batches.rows(moment.step))
        epochs = max(rows / text.rows[name].rows for name, rows in read.items())
        found = moment.program.evaluate(moment.parameters, moment.scales.multipliers)
        yield {
            "step": moment.step,
            "tokens": batches.tokens(moment.step),
            "epochs": round(epochs, 4),
            "loss": moment.loss,
        } | {key: found[key] for key in ("heldout_loss", "heldout_bits_per_byte")}

    return workbench.train(trial, trial.keep or (trial.total,), observe)


@dataclass(frozen=True)
class Grid:
    """What the branches of all sizes ended at.

    `N_S` are parameters without the embedding, `D_E` tokens, both rising; `losses_SER` held-out losses in nats per
    token, infinite where a trial diverged or is missing.
    """

    axis: str
    sizes: tuple[int | str, ...]
    N_S: np.ndarray
    D_E: np.ndarray
    losses_SER: np.ndarray
    tokens_trained: int  # of one size and seed: its trunk and its decays
    epochs: float  # of the text, by the end of the longest

    @cached_property
    def mean_SE(self) -> np.ndarray:
        """Over the seeds."""
        return self.losses_SER.mean(axis=-1)

    @property
    def tokens_from_scratch(self) -> int:
        """What the same points would take with a run for each."""
        return int(self.D_E.sum())

    def models(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """N, D, loss and the number of the trunk [T] of the models that are there."""
        S, E, R = np.nonzero(np.isfinite(self.losses_SER))
        return self.N_S[S], self.D_E[E], self.losses_SER[S, E, R], S * self.losses_SER.shape[-1] + R

    @property
    def rise_with_data(self) -> float:
        """The most that any size is worse at the end of a longer branch than at that of the next shorter one."""
        return float(np.diff(self.mean_SE, axis=1).max())

    @property
    def rise_with_size(self) -> float:
        """The most that a model is worse than the next smaller one at the same amount of data."""
        return float(np.diff(self.mean_SE, axis=0).max())


def grid(rows: Iterable[Row]) -> Grid:
    """From the table of the trials. Raises UserError if no branch has ended."""
    rows = list(rows)
    ended = [row for row in rows if row["part"] == "branch" and "step" in row]
    if not ended:
        raise UserError("scaling law: no branch has reached its end; expected losses to fit")
    axis = ended[0]["axis"]
    names = {row["parameters"]: row[axis] for row in rows}
    N, D, seeds = sorted(names), sorted({row["tokens"] for row in ended}), sorted({row["seed"] for row in rows})
    losses_SER = np.full((len(N), len(D), len(seeds)), np.inf)
    for row in ended:
        losses_SER[N.index(row["parameters"]), D.index(row["tokens"]), seeds.index(row["seed"])] = row["heldout_loss"]
    # Steps are tokens but for a factor: it is that of the longest branch, exact unless batches grow.
    longest = max(ended, key=lambda row: row["step"])
    steps = {row["step"]: row["step"] - row["after"] for row in ended}
    trained = longest["after"] + sum(steps.values())
    return Grid(
        axis,
        tuple(names[n] for n in N),
        np.array(N, float),
        np.array(D, float),
        losses_SER,
        round(trained * longest["tokens"] / longest["step"]),
        longest["epochs"],
    )
