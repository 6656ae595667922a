"""A trace of some steps by the profiler of JAX, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from cpmjax.training.metrics import Throughput


class Profile:
    """Traces the steps of `log.profile_steps`, and what the job does between them, into a folder.

    Steps that the job does not do, as they lie behind a resumed one, are not in the trace; without any there is none.
    Leave it to end a trace that a stop or an error cut short: use it in a `with`.
    """

    def __init__(self, folder: Path, steps: range, throughput: Throughput):
        self._folder, self._steps, self._throughput = folder, steps, throughput
        self._tracing = False

    def before(self, step: int, previous: object) -> None:
        """Begins the trace if one begins with this step; the arrays of the `previous` one are waited for first."""
        if step in self._steps and not self._tracing:
            jax.block_until_ready(previous)  # else its end would be in the trace
            with self._throughput.paused("profiling"):
                jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, arrays: object) -> None:
        """Ends the trace after its last step, once that step's `arrays` are there."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(arrays)
            self._stop()

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        with self._throughput.paused("profiling"):
            jax.profiler.stop_trace()
