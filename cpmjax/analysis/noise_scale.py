"""The gradient noise scale: up to which batch more data makes a step better (McCandlish et al. 1812.06162).

With G the gradient of the whole distribution and S the trace of the covariance of one example's gradient, the gradient
of B examples has E|G_B|^2 = |G|^2 + S / B. Two batch sizes therefore give both without bias, and

    B_simple = S / |G|^2

examples: there noise and signal of a step are equally large. Here an example is a row, and B_simple is given in tokens.
MiniCPM's law of the best batch, 1.21e9 / L^6.24 tokens (2404.06395, section 3.2), was measured over whole runs, on
losses per token of C4 and a vocabulary of 122,753: about the same trade, in another unit of loss. Compare trends, not
levels.

R rows, G groups of r rows each, W weights of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from cpmjax.analysis.derivatives import Loss, LossOf, wide_parameters
from cpmjax.checkpoint.series import Series
from cpmjax.model.parameters import Tree
from cpmjax.run.errors import UserError


def from_two_batches(small: float, square_small: Any, large: float, square_large: Any) -> tuple[Any, Any]:
    """(|G|^2, S) without bias, from squared norms of gradients of `small` and `large` examples, or means of them."""
    signal = (large * square_large - small * square_small) / (large - small)
    noise = (square_small - square_large) / (1 / small - 1 / large)
    return signal, noise


@dataclass(frozen=True)
class NoiseScale:
    """|G|^2 and S of one example, with the standard errors of both (jackknife over groups of rows)."""

    signal: float
    noise: float
    signal_error: float
    noise_error: float
    tokens: float  # that count in an example

    @property
    def batch(self) -> float:
        """B_simple in tokens; infinite if no gradient was seen through the noise."""
        return self._batch(self.signal)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %, in tokens: that of |G|^2, which is by far the less certain of the two. It may have no upper end."""
        return self._batch(self.signal + 1.96 * self.signal_error), self._batch(self.signal - 1.96 * self.signal_error)

    def _batch(self, signal: float) -> float:
        return self.tokens * self.noise / signal if signal > 0 else float("inf")


def noise_scales(
    series: Series, steps: Iterable[int], batch: dict[str, Any], groups: int = 16
) -> dict[int, NoiseScale]:
    """{step: noise scale} of the loss of checkpoints on the rows of a batch, a dict of [R, L] arrays."""
    tokens = float(np.asarray(batch["weights"]).sum(axis=1).mean())
    loss = Loss.of(series)  # equal for lines of one model, which then share a program
    return {step: noise_scale(loss, wide_parameters(series, step), batch, tokens, groups) for step in steps}


def noise_scale(loss: LossOf, parameters: Tree, batch: dict[str, Any], tokens: float, groups: int = 16) -> NoiseScale:
    """Of a loss at these parameters, over the rows of a batch, each of which counts `tokens`.

    One gradient a row, one row at a time; the sums over `groups` of rows are kept. Small batch: a row; large batch: all
    rows. Compiles once a loss and shape. Raises UserError unless the rows are a multiple of `groups`, at least two.
    """
    rows = len(next(iter(batch.values())))
    if groups < 2 or rows % groups:
        raise UserError(f"noise scale: {rows} rows in {groups} groups; expected a multiple of at least two groups")
    parts = [{key: value[g::groups, None] for key, value in batch.items()} for g in range(groups)]
    gradients, squares_G = zip(*(_group_sums(loss, parameters, part) for part in parts), strict=True)
    gradients_GW = jnp.stack(gradients)
    gram_GG = np.asarray(gradients_GW @ gradients_GW.T, np.float64)
    return _of_gram(gram_GG, np.asarray(squares_G, np.float64), rows // groups, tokens)


@partial(jax.jit, static_argnums=0)
def _group_sums(loss: LossOf, parameters: Tree, rows: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """(sum of the gradients of a group's rows [W], sum of their squared norms); the rows are [r, 1, L]."""
    flat_W, unravel = ravel_pytree(parameters)

    def add(total: tuple[jax.Array, jax.Array], row: dict[str, Any]) -> tuple[tuple[jax.Array, jax.Array], None]:
        gradient_W = jax.grad(lambda flat_W: loss(unravel(flat_W), row))(flat_W).astype(jnp.float32)
        return (total[0] + gradient_W, total[1] + jnp.sum(gradient_W**2)), None

    nothing = (jnp.zeros(flat_W.shape, jnp.float32), jnp.zeros((), jnp.float32))
    return jax.lax.scan(add, nothing, rows)[0]


def _of_gram(gram_GG: np.ndarray, squares_G: np.ndarray, rows: int, tokens: float) -> NoiseScale:
    """From the inner products of the groups' summed gradients, and the sums of their rows' squared norms."""

    def estimate(kept: np.ndarray) -> np.ndarray:
        count = rows * kept.sum()
        large = kept @ gram_GG @ kept / count**2
        return np.array(from_two_batches(1, kept @ squares_G / count, count, large))

    groups = len(squares_G)
    found = estimate(np.ones(groups))
    without = np.array([estimate(kept) for kept in 1 - np.eye(groups)])
    errors = np.sqrt((groups - 1) * np.mean((without - without.mean(axis=0)) ** 2, axis=0))
    return NoiseScale(float(found[0]), float(found[1]), float(errors[0]), float(errors[1]), tokens)


def per_example(gradients_RW: np.ndarray) -> tuple[float, float]:
    """(|G|^2, S) from the gradients of all examples at once: the same numbers by the definition of a covariance."""
    mean_W = gradients_RW.mean(axis=0)
    noise = float(np.sum((gradients_RW - mean_W) ** 2) / (len(gradients_RW) - 1))
    return float(mean_W @ mean_W) - noise / len(gradients_RW), noise
