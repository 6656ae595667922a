"""From what a step measured on the device to a line of the log, one step late, so that the device never waits."""

from __future__ import annotations

from collections.abc import Callable

import jax

from cpmjax.run.errors import UserError
from cpmjax.training.log import Log
from cpmjax.training.metrics import Throughput
from cpmjax.training.timeline import Timeline


class Recorder:
    """Holds the newest step's metrics until the next step is under way, or until `flush`."""

    def __init__(
        self,
        log: Log,
        timeline: Timeline,
        throughput: Throughput,
        start: int,
        skipped: int,
        last_good: Callable[[], str],
    ):
        """`start` steps lie behind, `skipped` of them without an update; `last_good` names the newest checkpoint."""
        self._log, self._timeline, self._throughput = log, timeline, throughput
        self._skipped_before = skipped
        self._last_good = last_good
        self._logged = start
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, on_device: dict[str, jax.Array]) -> None:
        """Writes down the step before this one. Raises UserError if its loss was not finite once too often."""
        self.flush()
        self._pending = step, on_device

    def flush(self, evaluation: dict[str, float] | None = None) -> None:
        """Writes down the newest step, together with what an evaluation after it found."""
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(on_device).items()}
        self._check(step, metrics)
        if evaluation is None and step % self._timeline.config.log.every:
            return
        clock = self._throughput.measure(self._timeline.tokens(step) - self._timeline.tokens(self._logged))
        self._logged = step
        self._log.write(self._timeline.facts(step) | metrics | (evaluation or {}) | clock)

    def _check(self, step: int, metrics: dict[str, float]) -> None:
        allowed = self._timeline.config.training.skip_nonfinite
        if metrics["skipped"] <= max(allowed, self._skipped_before):
            return
        first, last = self._timeline.position(step - 1), self._timeline.position(step) - 1
        raise UserError(
            f"{self._timeline.config.run.directory}: loss {metrics['loss']:g} and gradient norm "
            f"{metrics['grad_norm']:g} at step {step}, rows {first} to {last}; expected finite numbers, with at most "
            f"training.skip_nonfinite = {allowed} exceptions; last good checkpoint: {self._last_good()}"
        )
