"""What a study costs, said before it begins: FLOPs by the formula behind MFU, seconds by the speed of this machine."""

from __future__ import annotations

import time
from dataclasses import replace

import jax
import jax.numpy as jnp

from cpmjax.checkpoint.series import Series
from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.loss import mean_loss
from cpmjax.model.parameters import count, specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ModelConfig

# In forward passes. A product x W has two for its gradient; each of the three has two factors, so that its derivative
# along a direction is two products more: 3 * (1 + 2).
GRADIENT, HVP = 3, 9


def describe_cost(series: Series, tokens: int, forward: int = 0, gradient: int = 0, hvp: int = 0) -> str:
    """Two lines: the FLOPs of so many forward passes, gradients and Hessian-vector products (gradients included) of
    `tokens` tokens each, and what that takes at the speed measured here, on a few rows. Reads no checkpoint.
    """
    length = _length(series)
    parts = [(forward, 1, "forward passes"), (gradient, GRADIENT, "gradients"), (hvp, HVP, "Hessian-vector products")]
    named = ", ".join(f"{number:,} {name}" for number, _, name in parts if number) or "nothing"
    flops = sum(number * passes for number, passes, _ in parts) * tokens * forward_flops(series.config.model, length)
    speed, measured = _speed(series, tokens)
    return (
        f"Cost: {named} of {tokens:,} tokens by {count(series.config.model):,} parameters, {_units(flops, 'FLOP')}\n"
        f"(counted as 1, {GRADIENT} and {HVP} forward passes): about {_duration(flops / speed)} at the "
        f"{_units(speed, 'FLOP/s')} of a forward pass of {measured:,} tokens here, and compiling."
    )


def forward_flops(config: ModelConfig, length: int) -> float:
    """For one token of rows of `length` tokens: 2 a weight that it is multiplied with, the head included, and
    attention."""
    return training_flops_per_token(config, length) / 3


def _length(series: Series) -> int:
    """Of the rows that `cpmjax.analysis.text` makes."""
    return series.config.data.sequence_length if series.config.data.corpora else 256


def _speed(series: Series, tokens: int) -> tuple[float, int]:
    """(FLOP/s, of how many tokens) of the loss. A model of the first layers alone stands for the whole one, and zeros
    for the weights: neither changes the speed much, and a large model would take long to read."""
    length = _length(series)
    rows = min(max(tokens // length, 1), 8)
    config = replace(series.config.model, layers=min(series.config.model.layers, 2))
    parameters = jax.tree.map(lambda spec: jnp.zeros(spec.shape, jnp.float32), specs(config))
    model = MiniCPM(config, parameters, series.compute)
    zeros = jnp.zeros((rows, length), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), zeros.shape)
    batch = {"tokens": zeros, "targets": zeros, "positions": positions, "segments": zeros + 1, "weights": zeros + 1.0}
    mean_loss(model, batch).block_until_ready()  # compiles
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mean_loss(model, batch).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return forward_flops(config, length) * rows * length / min(seconds), rows * length


def _units(amount: float, unit: str) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if amount >= size:
            return f"{amount / size:.3g} {prefix}{unit}"
    return f"{amount / 1e6:.3g} M{unit}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.0f} h"
