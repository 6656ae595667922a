"""Learning-rate schedules side by side, with as much of one trunk in common as the method allows.

For each seed, on the same rows, with S the length of the experiment's schedule (Hu et al. 2404.06395, Figures 4 and 5):

    constant                      the trunk: warm-up, then the peak to S; its weights also give the merges
    lawa, wsm 10% 20%             merges of the trunk's last weights: a mean, and what imitates the decay
    wsd 2.5% 10% 20%              decays that end at S, also of other shapes
    wsd 10% ending at 40% ...     decays from earlier on the same trunk, a tenth of what they end
    wsd-s                         goes on at the peak from the decay that ended at 50%, then decays again (2410.05192)
    cosine                        half a cosine to S
    cosine(S/2), then its floor   the half period is not S; at the cosine's own best peak, as the loop is
    cosine(2S)                    cut off at S
    cosine-loop                   down, up and down again

`constant` and `wsd 10%` run at every peak of a grid, `cosine` at twice those, so that each is seen at its own best one.
All decays and cosines have the experiment's floor.

S updates, T losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import draccus
import numpy as np

from cpmjax.run.config import Config
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import OptimizerConfig
from cpmjax.run.schedule import WSD, WSDS, Constant, Cosine, CosineLoop, Schedule, Shape
from cpmjax.run.table import Row
from cpmjax.tunnel.faults import table_of
from cpmjax.tunnel.trials import Trial

# Shapes beside the experiment's own, by the length of the decay as a share of S.
SHAPES: dict[float, tuple[Shape, ...]] = {
    0.1: ("half_life", "exponential", "linear", "cosine", "one_minus_sqrt", "one_minus_square", "inverse"),
    0.2: ("exponential", "linear", "one_minus_sqrt"),
    0.025: (),
}
EARLY = (0.4, 0.5, 0.6, 0.8)  # of S: where decays end that say what the trunk was worth there
_HALF_LIVES = 3.7  # in a decay: 18,500 steps with a half-life of 5,000 in MiniCPM-2B
_COSINE = 2  # the cosine's peaks are so many times the others': by the convex bound (2501.18965) its best one is
_PLAN = "schedules.json"


@dataclass(frozen=True)
class _Plan:
    """Trials of one seed at one peak."""

    config: Config
    peak: float
    seed: int

    @property
    def schedule(self) -> WSD:
        return self.config.schedule  # type: ignore[return-value]

    @property
    def total(self) -> int:
        return self.schedule.total

    def trial(self, method: str, schedule: Schedule, trunk: Trial | None = None, after: int = 0, **how: Any) -> Trial:
        """`how`: what to keep of it; and an optimizer, if it is not the experiment's at this peak."""
        own = self.config.optimizer.learning_rate
        name = method if self.peak == own else f"{method}, peak {self.peak:g}"
        labels = {"method": method, "learning_rate": self.peak, "run": name, "after": after, "seed": self.seed}
        optimizer = how.pop("optimizer", replace(self.config.optimizer, learning_rate=self.peak))
        run = replace(self.config.run, seed=self.seed)
        config = replace(self.config, run=run, optimizer=optimizer, schedule=schedule)
        return Trial(labels, config, table_of(config.model.parametrisation), trunk, after, **how)

    def constant(self, keep: Iterable[int]) -> Trial:
        never = replace(self.schedule, stable=self.total - self.schedule.warmup, decay=0)
        return self.trial("constant", never, keep=tuple(sorted(set(keep))))

    def decay(self, method: str, trunk: Trial, end: int, length: int, shape: Shape | None = None, **how: Any) -> Trial:
        schedule = decaying(self.schedule, end, length, shape)
        return self.trial(method, schedule, trunk, end - length, **how)

    def cosine(self, method: str, half_period: int, length: int, **how: Any) -> Trial:
        """Lengths without the warm-up."""
        warmup, floor = self.schedule.warmup, self.schedule.floor
        kind = Cosine(warmup, length, floor)
        if half_period != length:
            kind = CosineLoop(warmup, length, floor, half_period=half_period)
        return self.trial(method, kind, **how)


def in_steps(config: Config) -> Config:
    """The experiment with lengths in steps, and the stable mixture throughout: schedules differ in nothing else.

    Raises UserError unless its schedule is WSD with a floor, long enough for the shortest decay and the earliest.
    """
    batches = config.batches
    schedule = config.schedule.in_steps(batches)
    if not isinstance(schedule, WSD):
        kind = schedule.get_choice_name(type(schedule))
        raise UserError(f"schedule.type = {kind}: expected wsd, whose length, warm-up and floor all schedules share")
    if schedule.floor == 0:
        raise UserError("schedule.floor = 0: expected more, some of the shapes never reach 0")
    first = min(end - length for end, length in early_decays(schedule.total))
    if schedule.total < 40 or schedule.warmup >= first:
        raise UserError(
            f"schedule: {schedule.total} steps with {schedule.warmup} of warm-up; expected at least 40, and a warm-up "
            f"that ends before step {first}, where the earliest decay begins"
        )
    training = replace(config.training, batch_warmup=batches.warmup)
    return replace(config, schedule=schedule, training=training, data=replace(config.data, decay={}))


def early_decays(total: int) -> list[tuple[int, int]]:
    """(end, length) of the decays that end before S."""
    ends = [round(share * total) for share in EARLY]
    return [(end, round(end / 10)) for end in ends]


def decaying(schedule: WSD, end: int, length: int, shape: Shape | None = None) -> WSD:
    """The schedule with a decay of this length, its last update `end`; the shape is the schedule's if none is given."""
    shape = shape or schedule.shape
    half_life = length / _HALF_LIVES if shape == "half_life" else None
    stable = end - length - schedule.warmup
    return replace(schedule, stable=stable, decay=length, shape=shape, half_life=half_life)


def make_trials(config: Config, peaks: Sequence[float], seeds: int) -> list[Trial]:
    """All trials but those at the cosine's best peak. `peaks` are the others' learning rates, the experiment's own one
    among them."""
    planned = []
    for seed in range(seeds):
        for peak in peaks:
            plan = _Plan(config, peak, seed)
            own = peak == config.optimizer.learning_rate
            planned += _of_the_trunk(plan) if own else _of_another_peak(plan)
            length = plan.total - plan.schedule.warmup
            planned.append(replace(plan, peak=_COSINE * peak).cosine("cosine", length, length))
    return planned


def make_period_trials(config: Config, peak: float, seeds: int) -> list[Trial]:
    """Cosines whose half period is not S, at one peak."""
    planned = []
    for seed in range(seeds):
        plan = _Plan(config, peak, seed)
        total, warmup, floor = plan.total, plan.schedule.warmup, plan.schedule.floor
        half = total // 2
        short = plan.cosine("cosine(S/2)", half - warmup, half - warmup, keep=(half,))
        # A schedule ends with its last piece; what follows is a branch at the rate that it ended with.
        optimizer = _slowed(replace(config.optimizer, learning_rate=peak), floor)
        planned += [
            short,
            plan.trial(
                "cosine(S/2), then its floor", Constant(warmup, total - warmup), short, half, optimizer=optimizer
            ),
            plan.cosine("cosine(2S)", 2 * total - warmup, total - warmup),
            plan.cosine("cosine-loop", round((total - warmup) / 3), total - warmup),
        ]
    return planned


def _of_the_trunk(plan: _Plan) -> list[Trial]:
    total = plan.total
    lengths = {share: round(share * total) for share in SHAPES}
    early = early_decays(total)
    trunk = plan.constant([total - length for length in lengths.values()] + [end - length for end, length in early])
    planned = [trunk]
    for share, length in lengths.items():
        name = f"wsd {100 * share:g}%"
        planned.append(plan.decay(name, trunk, total, length))
        shapes = [shape for shape in SHAPES[share] if shape != plan.schedule.shape]
        planned += [plan.decay(f"{name} {shape}", trunk, total, length, shape) for shape in shapes]
    for share, (end, length) in zip(EARLY, early, strict=True):
        keep = (end,) if share == 0.5 else ()
        decay = plan.decay(f"wsd 10% ending at {100 * share:g}%", trunk, end, length, keep=keep)
        planned.append(decay)
        if keep:
            planned.append(_again(plan, decay, end, length))
    return planned


def _again(plan: _Plan, decay: Trial, end: int, length: int) -> Trial:
    """WSD-S: from the end of a decay back to the peak, and a decay to S as long as that of `wsd 10%`."""
    last, schedule = round(plan.total / 10), decaying(plan.schedule, plan.total, round(plan.total / 10))
    cycles = ((end - length - schedule.warmup, length), (plan.total - end - last, last))
    again = WSDS(schedule.warmup, cycles, schedule.shape, schedule.floor, schedule.half_life)
    return plan.trial("wsd-s", again, decay, end)


def _of_another_peak(plan: _Plan) -> list[Trial]:
    length = round(plan.total / 10)
    trunk = plan.constant([plan.total - length])
    return [trunk, plan.decay("wsd 10%", trunk, plan.total, length)]


def _slowed(optimizer: OptimizerConfig, share: float) -> OptimizerConfig:
    """An optimizer whose peak is what this one has at a share of its own, of the weight decay too."""
    decay = optimizer.weight_decay * (share if optimizer.weight_decay_mode == "independent" else 1)
    return replace(optimizer, learning_rate=share * optimizer.learning_rate, weight_decay=decay)


# The rates of all updates, for laws of the loss.

Segments = list[dict[str, Any]]  # {"until": last step, "peak": learning rate, "schedule": from step 1, as in YAML}


def plan_of(trials: Iterable[Trial]) -> dict[str, Segments]:
    """{run: its segments}; they are the same for every seed."""
    return {str(trial.labels["run"]): _segments(trial) for trial in trials}


def _segments(trial: Trial) -> Segments:
    before = _segments(trial.trunk) if trial.trunk is not None else []
    kept = [segment for segment in before if segment["until"] < trial.after]
    if trial.trunk is not None:
        kept.append(before[len(kept)] | {"until": trial.after})
    schedule, peak = trial.config.schedule, trial.config.optimizer.learning_rate
    encoded = json.loads(json.dumps(draccus.encode(schedule, Schedule)))
    return [*kept, {"until": schedule.total, "peak": peak, "schedule": encoded}]


def save_plan(directory: str | Path, plan: dict[str, Segments]) -> None:
    lines = (f"  {json.dumps(run)}: {json.dumps(segments)}" for run, segments in plan.items())
    write_atomically(Path(directory) / _PLAN, "{\n" + ",\n".join(lines) + "\n}\n")


def load_plan(directory: str | Path) -> dict[str, Segments]:
    """{run: segments} of a study of schedules. Raises UserError if it has none."""
    try:
        return json.loads((Path(directory) / _PLAN).read_text())
    except FileNotFoundError as error:
        raise UserError(f"{directory}: has no {_PLAN}; expected the directory of a study of schedules") from error


def rates(segments: Segments) -> np.ndarray:
    """float64 [S]: the learning rate of every update from the first on, at the base width."""
    found, after = [], 0
    for segment in segments:
        schedule = draccus.decode(Schedule, segment["schedule"])
        found.append(segment["peak"] * schedule.factor(np.arange(after + 1, segment["until"] + 1)))
        after = segment["until"]
    return np.concatenate(found)


@dataclass(frozen=True)
class SeedCurve:
    """One run of one seed: the rates of all its updates, its trunk's included, and its own held-out losses in nats."""

    run: str
    seed: int
    rates_S: np.ndarray
    steps_T: np.ndarray
    losses_T: np.ndarray
    warmup: int


def curves(rows: Iterable[Row], plan: dict[str, Segments]) -> list[SeedCurve]:
    """From the table and the plan of a study: every run of every seed that came to its end, merges left out."""
    points: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in rows:
        if row["run"] in plan and row["status"] == "finished":
            points.setdefault((row["run"], row["seed"]), []).append((row["step"], row["heldout_loss"]))
    found = []
    for (run, seed), losses in points.items():
        steps_T, losses_T = np.transpose(losses)
        warmup = plan[run][0]["schedule"]["warmup"]
        found.append(SeedCurve(run, seed, rates(plan[run]), steps_T.astype(int), losses_T, warmup))
    return found
