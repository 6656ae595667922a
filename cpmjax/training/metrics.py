"""Numbers that say how a run is doing: norms by class of parameter, throughput, MFU, goodput."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.parameters import Tree, specs
from cpmjax.parallel.chips import peak_flops
from cpmjax.run.config import Config, ModelConfig


def norms_by_role(name: str, config: ModelConfig, tree: Tree) -> dict[str, jax.Array]:
    """{"name/matrix": L2 norm of all matrices together, ...} of a tree with the parameters' structure."""
    squares: dict[str, jax.Array] = {}
    for spec, leaf in zip(jax.tree.leaves(specs(config)), jax.tree.leaves(tree), strict=True):
        squares[spec.role] = squares.get(spec.role, jnp.zeros(())) + jnp.sum(leaf.astype(jnp.float32) ** 2)
    return {f"{name}/{role}": jnp.sqrt(square) for role, square in squares.items()}


class Throughput:
    """Tokens per second and MFU between two logged steps, and goodput, the share of a job's time that steps have had.

    MFU = tokens per second * training FLOPs per token (`cpmjax.model.flops`) / (devices * peak FLOPs of one); the
    seconds of evaluation, saving and profiling do not count there.
    Goodput = 1 - (seconds of start-up, which compiles, waiting for data, evaluation, saving and profiling) / seconds
    since the job began, from 0 to 1. It is about this job alone: that a later one repeats the steps which a kill took
    after the last checkpoint shows in neither.
    """

    def __init__(self, config: Config, began: float):
        """`began`: when the job did, by `time.perf_counter`."""
        self._flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        peak, source = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count()
        self.formula = (
            f"MFU = tokens/s x {self._flops_per_token:.4g} FLOPs a token (6 N and causal attention) "
            f"/ {self._peak:.4g} FLOPs/s ({jax.device_count()} x {source})"
        )
        self._began = began

    def start(self, waited: Callable[[], float]) -> None:
        """Begins to measure steps: the start-up is over. `waited` tells the seconds waited for data since then."""
        self._start = self._last = time.perf_counter()
        self._waited = waited
        self._paused = {"evaluation": 0.0, "saving": 0.0, "profiling": 0.0}
        self._paused_at_last = 0.0

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """For `kind`: evaluation, saving or profiling."""
        began = time.perf_counter()
        yield
        self._paused[kind] += time.perf_counter() - began

    def measure(self, tokens: int) -> dict[str, float]:
        """The clock's part of a metrics line; its rates are over the tokens since the last one."""
        now, paused = time.perf_counter(), sum(self._paused.values())
        rate = tokens / max(now - self._last - (paused - self._paused_at_last), 1e-9)
        self._last, self._paused_at_last = now, paused
        mfu = rate * self._flops_per_token / self._peak
        goodput = self._seconds_by_kind(now)["steps"] / max(now - self._began, 1e-9)
        return {"tokens_per_second": rate, "mfu": mfu, "goodput": goodput, "seconds": now - self._start}

    def summary(self, steps: int, tokens: int) -> str:
        """Two lines: the first about the steps, the second about the whole job."""
        now = time.perf_counter()
        elapsed, total, seconds = now - self._start, now - self._began, self._seconds_by_kind(now)
        rate = tokens / max(elapsed - sum(self._paused.values()), 1e-9)
        mfu = rate * self._flops_per_token / self._peak
        return (
            f"{steps} steps in {elapsed:.1f} s, {rate:,.0f} tokens/s and MFU {mfu:.1%} without evaluation and saving; "
            f"{self._waited():.1f} s of it waiting for data\n"
            f"goodput {seconds['steps'] / max(total, 1e-9):.1%} of {total:.1f} s: "
            + ", ".join(f"{kind} {part:.1f} s" for kind, part in seconds.items())
        )

    def _seconds_by_kind(self, now: float) -> dict[str, float]:
        """They add up to the seconds since the job began."""
        elsewhere = {"start-up": self._start - self._began, "waiting for data": self._waited()} | self._paused
        return {"steps": now - self._began - sum(elsewhere.values())} | elsewhere
