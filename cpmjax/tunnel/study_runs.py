"""The study series: one trunk with its branches, and what they are compared with, small enough to be made in minutes.

    trunk     warm-up and stable stage: nine tenths of the whole length
    decay10   leaves the trunk at its end and decays over the last tenth
    decay20   leaves it earlier and decays over the last two tenths
    constant  leaves it at its end and goes on at the peak
    cosine    from scratch, half a cosine over the whole length, with a peak of its own
    seed2     from scratch with another seed: what trunk and decay10 are together
    mixed10   decay10, but reading the mixture of `data.decay`; left out where the experiment has none

All but the trunk end at the same step. Each is an ordinary experiment, and each run an ordinary run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cpmjax.checkpoint.series import TRUNK
from cpmjax.run.config import BranchConfig, Config
from cpmjax.run.directory import Lines, RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD, Cosine, Schedule
from cpmjax.run.table import Row

_SPARSE = 5  # how many times as far apart as the trunk's are the checkpoints of what is only compared with it


def members(config: Config, cosine_peak: float) -> dict[str, Config]:
    """{name: experiment}, parents first; their runs are folders of `config.run.directory`.

    The cosine's peak is `cosine_peak` times that of the others. Raises UserError unless the schedule is WSD, long
    enough for its warm-up to end before the longer decay begins.
    """
    schedule = config.schedule.in_steps(config.batches)
    if not isinstance(schedule, WSD):
        kind = schedule.get_choice_name(type(schedule))
        raise UserError(f"schedule.type = {kind}: expected wsd, whose stable stage the series branches from")
    total = schedule.total
    early, late = total - round(total / 5), total - round(total / 10)
    if not schedule.warmup < early < late < total:
        raise UserError(
            f"schedule: {total} steps with {schedule.warmup} of warm-up; expected at least 10, and a warm-up that "
            f"ends before step {early}, where the longer decay begins"
        )
    root = Path(config.run.directory)
    alike = replace(config.data, decay={})
    sparse = replace(config.checkpoint, every=_SPARSE * config.checkpoint.every)

    def member(name: str, schedule: Schedule, after: int = 0, **sections: Any) -> Config:
        branch = BranchConfig(str(root / TRUNK), after) if after else BranchConfig()
        run = replace(config.run, directory=str(root / name))
        own: dict[str, Any] = {"run": run, "branch": branch, "schedule": schedule, "data": alike}
        return replace(config, **(own | sections))

    def decaying(after: int) -> WSD:
        return replace(schedule, stable=after - schedule.warmup, decay=total - after)

    kept = replace(config.checkpoint, steps=(*config.checkpoint.steps, early, late))
    peak = cosine_peak * config.optimizer.learning_rate
    other = replace(config.run, directory=str(root / "seed2"), seed=config.run.seed + 1)
    found = {
        TRUNK: member(TRUNK, replace(schedule, stable=late - schedule.warmup, decay=0), checkpoint=kept),
        "decay10": member("decay10", decaying(late), late),
        "decay20": member("decay20", decaying(early), early),
        "constant": member("constant", replace(schedule, stable=total - schedule.warmup, decay=0), late),
        "cosine": member(
            "cosine",
            Cosine(schedule.warmup, total - schedule.warmup, schedule.floor),
            checkpoint=sparse,
            optimizer=replace(config.optimizer, learning_rate=peak),
        ),
        "seed2": member("seed2", decaying(late), checkpoint=sparse, run=other),
    }
    if config.data.decay and config.data.weights("decay") != config.data.weights("stable"):
        found["mixed10"] = member("mixed10", decaying(late), late, data=config.data)
    return found


def results(config: Config, names: list[str]) -> list[Row]:
    """A row for each member: its last step and learning rate, and the held-out losses there, in nats per token."""
    rows = []
    for name in names:
        records = Lines.read(RunDirectory(Path(config.run.directory) / name).metrics_file)
        last = [record for record in records if "heldout_loss" in record][-1]
        losses = {key: value for key, value in last.items() if key.startswith(("heldout", "bits_per_byte"))}
        rows.append({"run": name, "step": last["step"], "learning_rate": last["learning_rate"]} | losses)
    return rows
