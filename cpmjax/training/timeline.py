"""What holds at each step of a run: learning rate, stage, place in the data, and what is due."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmjax.model import mup
from cpmjax.run.config import Config
from cpmjax.run.schedule import Schedule, rewarmup
from cpmjax.training.origin import Origin
from cpmjax.training.step import Rates


@dataclass(frozen=True)
class Timeline:
    """Pure functions of the number of a step; steps count from 1, and a checkpoint of step s has had s updates."""

    config: Config
    origin: Origin

    @property
    def schedule(self) -> Schedule:
        return self.config.schedule.in_steps(self.config.batches)

    @property
    def total(self) -> int:
        return self.schedule.total

    def stage(self, step: int) -> str:
        return self.schedule.stage(step)

    def learning_rate(self, step: int) -> float:
        """At the base width."""
        return self._rates(step)[0]

    def rates(self, step: int) -> Rates:
        rate, decay = self._rates(step)
        return Rates(np.float32(rate), np.float32(decay))

    def position(self, step: int) -> int:
        """Rows consumed after this step."""
        batches = self.config.batches
        return self.origin.position + batches.rows(step) - batches.rows(self.origin.step)

    def batches(self, after: int) -> Iterator[tuple[int, int]]:
        """(position, rows) of each batch from that of the step after `after` to the last."""
        ends = map(self.position, range(after, self.total + 1))
        return ((start, end - start) for start, end in itertools.pairwise(ends))

    def batch_sizes(self) -> list[int]:
        """The rows of the steps of this run, each size once."""
        return self.config.batches.used(self.origin.step, self.total)

    def stage_ends(self) -> list[tuple[str, int]]:
        """The stages that this run has a step of, with the rows consumed at the end of each."""
        stages = [stage for stage in self.schedule.stages() if stage.last > self.origin.step]
        return [(stage.name, self.position(stage.last)) for stage in stages]

    def tokens(self, step: int) -> int:
        """Tokens consumed after this step."""
        return self.position(step) * self.config.data.sequence_length

    def facts(self, step: int) -> dict[str, Any]:
        """What a line of metrics and a checkpoint say of their step."""
        return {
            "step": step,
            "tokens": self.tokens(step),
            "stage": self.stage(step),
            "learning_rate": self.learning_rate(step),
        }

    def evaluates(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.total

    def saves(self, step: int) -> bool:
        rules = self.config.checkpoint
        every = (rules.every_in_decay if self.stage(step) == "decay" else None) or rules.every
        last_before_decay = self.stage(step) == "stable" and self.stage(step + 1) == "decay"
        return step % every == 0 or step in rules.steps or last_before_decay or step == self.total

    def _rates(self, step: int) -> tuple[float, float]:
        factor = self.schedule.factor(step) * rewarmup(step, self.origin.step, self.origin.rewarmup)
        return mup.per_step(self.config.optimizer, factor)
