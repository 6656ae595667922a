"""The loss between checkpoints: along lines and beyond their ends, over pairs, planes and slices.

A barrier is how far the loss on the line between two checkpoints rises above the straight line between their losses
(Frankle et al. 1912.05671). A loss is any function of (parameters, batch) that is hashed by what it computes:
`cpmjax.analysis.rows.RowLosses`, or their mean, a `Loss`. The place on a line is an array, so one compiled program
serves all places and all checkpoints of one model; two checkpoints and what lies between them are in memory.

N checkpoints, S places on a line, P points, K checkpoints or directions mixed, R rows of text.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from cpmjax.analysis.derivatives import LossOf
from cpmjax.analysis.rows import Interval, RowLosses, bootstrap
from cpmjax.checkpoint.series import Series
from cpmjax.model.parameters import Tree, specs
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError


def between(one: Tree, other: Tree, share: Any) -> Tree:
    """The parameters at `share` of the way from one to the other, at least in float32; below 0 and above 1, beyond.

    Each half is measured from its own end: at 0 and 1 they are the very ends, and between equal ends the ends.
    """

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = (each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in (x, y))
        return jnp.where(share <= 0.5, x + share * (y - x), y - (1 - share) * (y - x))

    return jax.tree.map(leaf, one, other)


def mixture(trees: Sequence[Tree], coefficients_K: Any) -> Tree:
    """sum_k c_k tree_k, at least in float32."""

    def leaf(*leaves: jax.Array) -> jax.Array:
        wide = (each.astype(jnp.promote_types(each.dtype, jnp.float32)) for each in leaves)
        return sum(coefficients_K[k] * each for k, each in enumerate(wide))

    return jax.tree.map(leaf, *trees)


@partial(jax.jit, static_argnums=0)
def _loss_between(loss: LossOf, one: Tree, other: Tree, share: jax.Array, batch: dict[str, Any]) -> jax.Array:
    return loss(between(one, other, share), batch)


@partial(jax.jit, static_argnums=0)
def _loss_of_mixture(
    loss: LossOf, trees: Sequence[Tree], coefficients_K: jax.Array, batch: dict[str, Any]
) -> jax.Array:
    return loss(mixture(trees, coefficients_K), batch)


def losses_between(loss: LossOf, one: Tree, other: Tree, shares: Iterable[float], batch: dict[str, Any]) -> np.ndarray:
    """[S, ...]: the loss at each place of the line, whatever shape the loss has."""
    found = (_loss_between(loss, one, other, np.float32(share), batch) for share in shares)
    return np.stack([np.asarray(each) for each in found])  # one after another: each has parameters of its own


def losses_of_mixtures(
    loss: LossOf, trees: Sequence[Tree], coefficients_PK: np.ndarray, batch: dict[str, Any]
) -> np.ndarray:
    """[P, ...]: of points in the plane of checkpoints (`Plane.mixtures`), or of a checkpoint and directions."""
    trees, rows = tuple(trees), coefficients_PK.astype(np.float32)
    return np.stack([np.asarray(_loss_of_mixture(loss, trees, row, batch)) for row in rows])


def excess(shares_S: np.ndarray, losses_S: np.ndarray) -> np.ndarray:
    """How far losses [S, ...] on a line are above the straight line between those of its ends, at shares 0 and 1."""
    shares_S = np.asarray(shares_S)
    (first,), (last,) = (losses_S[shares_S == end] for end in (0, 1))
    return losses_S - first - shares_S.reshape(-1, *[1] * first.ndim) * (last - first)


def barrier(shares_S: np.ndarray, losses_S: np.ndarray) -> np.ndarray:
    """[...]: the largest excess between the ends, 0 at least; of losses [S, ...] at shares with 0 and 1 among them."""
    inside_S = (np.asarray(shares_S) > 0) & (np.asarray(shares_S) < 1)
    return np.maximum(0, excess(shares_S, losses_S)[inside_S].max(0))


@dataclass(frozen=True)
class Barriers:
    """Losses of rows on the lines between all pairs of N checkpoints."""

    shares_S: np.ndarray  # from 0 to 1
    losses_SNNR: np.ndarray  # [s, i, j]: at that share of the way from i to j; [:, i, i] the checkpoint i

    @property
    def losses_NR(self) -> np.ndarray:
        """Of the checkpoints themselves."""
        return np.diagonal(self.losses_SNNR[0]).T

    def heights(self) -> Interval:
        """[N, N], symmetric, with a diagonal of exact zeros. Being a maximum, noise makes it rather larger."""
        return bootstrap(partial(barrier, self.shares_S), self.losses_SNNR)


def barriers(
    checkpoints: Sequence[tuple[Series, int]],
    batch: dict[str, Any],
    inside: int = 3,
    known: MutableMapping[str, Any] | None = None,
) -> Barriers:
    """Over all pairs of checkpoints (series, step), of one series or of several, at so many places inside each line.

    Costs N + N (N - 1) / 2 * inside forward passes. Two checkpoints are in memory; each is read N times at most.
    `known` has the losses of pairs that were computed before, for the same batch, and gets the others: a ledger, say.
    Raises UserError if the series have different models.
    """
    known = {} if known is None else known
    loss, count = RowLosses.of(checkpoints[0][0]), len(checkpoints)
    for series, _ in checkpoints:
        if series.config.model != loss.config:
            raise UserError(f"{series.path}: another model than {checkpoints[0][0].path}; expected one model")
    batch, shares_S = jax.device_put(batch), np.linspace(0, 1, inside + 2)
    losses_SNNR = np.empty((inside + 2, count, count, len(batch["tokens"])), np.float32)
    with tqdm(total=count * (count - 1) // 2, unit="pair", disable=None) as progress:
        for i, (series, step) in enumerate(checkpoints):
            one = series.parameters(step)
            own_R = losses_between(loss, one, one, [0], batch)[0]
            losses_SNNR[0, i], losses_SNNR[-1, :, i], losses_SNNR[:, i, i] = own_R, own_R, own_R
            for j in range(i + 1, count):
                other, at = checkpoints[j]
                pair = f"{series.name} {step}, {other.name} {at}"
                if pair not in known:
                    known[pair] = losses_between(loss, one, other.parameters(at), shares_S[1:-1], batch).tolist()
                losses_SNNR[1:-1, i, j] = known[pair]
                losses_SNNR[1:-1, j, i] = losses_SNNR[1:-1, i, j][::-1]
                progress.update()
    return Barriers(shares_S, losses_SNNR)


def normalised(config: ModelConfig, direction: Tree, parameters: Tree) -> Tree:
    """A direction with the length of the parameters, filter by filter (Li et al. 1712.09913): a slice along it does not
    depend on scales that cancel, as between the matrices up and down.

    A filter is what makes one output of a matrix, or one token's vector of the embedding. Gains of norms stay as they
    are, their direction is 0.
    """

    def leaf(role: str, d: jax.Array, p: jax.Array) -> jax.Array:
        if role == "norm":
            return jnp.zeros_like(d)
        axis = -1 if role == "embedding" else -2
        lengths = (jnp.linalg.norm(each.astype(d.dtype), axis=axis, keepdims=True) for each in (p, d))
        return d * jnp.divide(*lengths)

    roles = jax.tree.map(lambda spec: spec.role, specs(config))
    return jax.tree.map(leaf, roles, direction, parameters)


def random_direction(config: ModelConfig, seed: int) -> Tree:
    """Standard normal numbers in the shape of the parameters, float32."""
    declared, structure = jax.tree.flatten(specs(config))
    keys = jax.random.split(jax.random.key(seed), len(declared))
    values = [jax.random.normal(key, spec.shape, jnp.float32) for key, spec in zip(keys, declared, strict=True)]
    return jax.tree.unflatten(structure, values)
