"""States of trials that branches go on from: `states/TRIAL/STEP` in the directory of a study, as checkpoints.

They may be deleted: one that is missing is made again, by training its trial to there.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.run.config import CheckpointConfig, Config
from cpmjax.training.padding import abstract_at_rest, at_rest, from_rest
from cpmjax.training.state import TrainState


class States:
    """Those of all trials of a study."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).expanduser() / "states"
        self._open: dict[str, _OfTrial] = {}

    def of(self, trial: str) -> _OfTrial:
        """Those of the trial of this identity."""
        if trial not in self._open:
            self._open[trial] = _OfTrial(self._directory / trial)
        return self._open[trial]

    def close(self) -> None:
        """Waits until what was saved is complete."""
        for each in self._open.values():
            each.close()
        self._open.clear()


class _OfTrial:
    def __init__(self, folder: Path) -> None:
        self._checkpoints = Checkpoints(folder, CheckpointConfig())

    def steps(self) -> list[int]:
        """Ascending."""
        return self._checkpoints.steps()

    def save(self, step: int, config: Config, state: TrainState) -> None:
        """Replaces nothing: a state is the same each time it is made."""
        if step not in self.steps():
            stored = at_rest(config.model, state)
            self._checkpoints.save(step, stored.trainable, stored.optimizer, {"skipped": 0}, {"step": step})

    def load(self, step: int, config: Config, abstract: TrainState) -> TrainState:
        """Placed as `abstract`, a tree of `jax.ShapeDtypeStruct`s."""
        checkpoints, stored = self._checkpoints, abstract_at_rest(config.model, abstract)
        checkpoints.wait()
        parameters = from_rest(checkpoints.parameters(step, stored.trainable), abstract.trainable)
        moments = from_rest(checkpoints.optimizer(step, stored.optimizer), abstract.optimizer)
        return TrainState(parameters, moments, jax.device_put(np.int32(0), abstract.skipped.sharding))

    def close(self) -> None:
        self._checkpoints.close()
