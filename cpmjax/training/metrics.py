"""Numbers that say how a run is doing: norms by class of parameter, throughput, MFU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

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
    """Tokens per second and MFU between two logged steps, without what is `paused` (evaluation, saving).

    MFU = tokens per second * training FLOPs per token (`cpmjax.model.flops`) / (devices * peak FLOPs of one).
    """

    def __init__(self, config: Config):
        self._flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
        peak, source = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count()
        self.formula = (
            f"MFU = tokens/s x {self._flops_per_token:.4g} FLOPs a token (6 N and causal attention) "
            f"/ {self._peak:.4g} FLOPs/s ({jax.device_count()} x {source})"
        )
        self.start()

    def start(self) -> None:
        """Begins to measure."""
        self._start = self._last = time.perf_counter()
        self._paused = self._paused_in_all = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def measure(self, tokens: int) -> dict[str, float]:
        """The clock's part of a metrics line, over the tokens since the last one."""
        now = time.perf_counter()
        rate = tokens / max(now - self._last - self._paused, 1e-9)
        self._paused_in_all += self._paused
        self._last, self._paused = now, 0.0
        mfu = rate * self._flops_per_token / self._peak
        return {"tokens_per_second": rate, "mfu": mfu, "seconds": now - self._start}

    def summary(self, steps: int, tokens: int) -> str:
        elapsed = time.perf_counter() - self._start
        training = max(elapsed - self._paused_in_all - self._paused, 1e-9)
        rate = tokens / training
        mfu = rate * self._flops_per_token / self._peak
        return f"{steps} steps in {elapsed:.1f} s, {rate:,.0f} tokens/s and MFU {mfu:.1%} without evaluation and saving"
