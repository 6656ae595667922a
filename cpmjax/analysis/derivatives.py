"""Gradients, Hessian-vector and Gauss-Newton-vector products of a loss, on trees of parameters as they are.

A loss is a pure function of (parameters, batch), hashable: it is part of the compiled program. Batches are dicts of
[K, B, L] arrays, of which one, [B, L], is at work at a time: memory does not grow with K.

K batches, B rows, L tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.checkpoint.series import Series
from cpmjax.data.batches import Batch
from cpmjax.model.loss import mean_loss
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, ModelConfig
from cpmjax.run.errors import UserError

LossOf = Callable[[Tree, Any], jax.Array]


@dataclass(frozen=True)
class Loss:
    """Nats a token of a model of this shape; equal ones share their compiled programs."""

    config: ModelConfig
    compute: ComputeConfig

    @classmethod
    def of(cls, series: Series) -> Self:
        return cls(series.config.model, series.compute)

    def __call__(self, parameters: Tree, batch: Any) -> jax.Array:
        return mean_loss(self.model(parameters), batch)

    def model(self, parameters: Tree) -> MiniCPM:
        return MiniCPM(self.config, parameters, self.compute)


def wide_parameters(series: Series, step: int) -> Tree:
    """In float32, whatever they are stored in: the way between two checkpoints is no matter of 16 bits."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), series.parameters(step))


def in_batches(rows: Batch, size: int) -> Batch:
    """[B, L] arrays -> [K, size, L], neighbours apart: every K-th row is of one batch. Raises UserError if `size` does
    not divide the number of rows."""
    count = len(rows["tokens"])
    if count % size:
        raise UserError(f"{count} rows in batches of {size}: expected a divisor of {count}")
    return {key: np.swapaxes(array.reshape(size, count // size, -1), 0, 1) for key, array in rows.items()}


@partial(jax.jit, static_argnames="loss")
def gradients(loss: LossOf, parameters: Tree, batches: Any) -> tuple[jax.Array, Tree]:
    """(losses [K], gradients with K in front) of each batch."""
    return jax.lax.map(lambda batch: jax.value_and_grad(loss)(parameters, batch), batches)


@partial(jax.jit, static_argnames="loss")
def hvp(loss: LossOf, parameters: Tree, direction: Tree, batch: Any) -> Tree:
    """H v of one batch: the derivative of its gradient along v (Pearlmutter 1994), forward over reverse."""
    return jax.jvp(lambda at: jax.grad(loss)(at, batch), (parameters,), (direction,))[1]


@partial(jax.jit, static_argnames="loss")
def mean_hvp(loss: LossOf, parameters: Tree, direction: Tree, batches: Any) -> Tree:
    """H v of all K batches together: the Hessian of the mean loss of their tokens."""
    return _mean(lambda batch: hvp(loss, parameters, direction, batch), direction, batches)


@partial(jax.jit, static_argnames="loss")
def mean_ggn(loss: Loss, parameters: Tree, direction: Tree, batches: Any) -> Tree:
    """G v, with G = J' (diag(p) - p p') J the Gauss-Newton matrix: of the Hessian, the part that only the curvature of
    the cross entropy makes, J the Jacobian of the logits (Schraudolph 2002). Never negative; a batch's logits [B, L, V]
    exist at once."""

    def of_batch(batch: Any) -> Tree:
        def logits(at: Tree) -> jax.Array:
            return loss.model(at)(batch["tokens"], batch["positions"], batch["segments"])

        logits_BLV, pull = jax.vjp(logits, parameters)
        moved_BLV = jax.jvp(logits, (parameters,), (direction,))[1]
        chances_BLV = jax.nn.softmax(logits_BLV)
        centred_BLV = moved_BLV - jnp.sum(chances_BLV * moved_BLV, axis=-1, keepdims=True)
        share_BL = batch["weights"] / jnp.sum(batch["weights"])
        return pull(share_BL[..., None] * chances_BLV * centred_BLV)[0]

    return _mean(of_batch, direction, batches)


def _mean(product: Callable[[Any], Tree], like: Tree, batches: Any) -> Tree:
    """Of a product over batches, each counted by its tokens."""
    counts_K = jnp.sum(batches["weights"], axis=(1, 2))
    shares_K = counts_K / jnp.sum(counts_K)

    def add(total: Tree, part: tuple[jax.Array, Any]) -> tuple[Tree, None]:
        share, batch = part
        return jax.tree.map(lambda sum_, x: sum_ + share * x, total, product(batch)), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), (shares_K, batches))[0]


# Trees as vectors.


def difference(last: Tree, first: Tree) -> Tree:
    return jax.tree.map(jnp.subtract, last, first)


@jax.jit
def products(first: Tree, second: Tree) -> jax.Array:
    """Inner products [J, K] of trees stacked J and K times."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1) @ y.reshape(len(y), -1).T

    return sum(jax.tree.leaves(jax.tree.map(leaf, first, second)), start=jnp.zeros(()))


@jax.jit
def inner(first: Tree, second: Tree) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, first, second)), start=jnp.zeros(()))
