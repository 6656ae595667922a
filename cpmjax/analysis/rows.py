"""The loss of each row of a text, and how sure a number is that is made of several such losses.

R rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.derivatives import Loss
from cpmjax.model.loss import batch_losses
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM


@dataclass(frozen=True)
class RowLosses(Loss):
    """A loss, (parameters, batch) -> float32 [R] in nats: what each row adds, their mean is the loss of the batch."""

    def __call__(self, parameters: Tree, batch: Any) -> jax.Array:
        return _row_losses(self.model(parameters), batch)


@jax.jit
def _row_losses(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    weights_RL = batch["weights"]
    losses_RL = batch_losses(model, batch).loss
    return jnp.sum(weights_RL * losses_RL, axis=1) * (len(weights_RL) / jnp.sum(weights_RL))


@dataclass(frozen=True)
class Interval:
    """A value, or an array of them, and where it lies for 95 of 100 other samples: of rows, or of seeds."""

    value: Any
    low: Any
    high: Any

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, ".4f")


def bootstrap(statistic: Callable[..., Any], *losses_R: np.ndarray, samples: int = 1000, seed: int = 0) -> Interval:
    """`statistic(*means)` of losses [..., R] of the same rows, and its percentile interval over rows drawn again.

    Rows are drawn for all losses together, so what they have in common cancels in a difference. The statistic gets
    means over rows with one axis more at the end, of samples, and keeps that axis.
    """
    rows = losses_R[0].shape[-1]
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), samples)
    shares_RS = np.concatenate([np.ones((1, rows)), draws]).T / rows  # the first sample is the rows as they are
    found = statistic(*(np.asarray(each, np.float64) @ shares_RS for each in losses_R))
    low, high = np.quantile(found[..., 1:], [0.025, 0.975], axis=-1)
    return Interval(found[..., 0], low, high)
