"""The curvature along the way from one checkpoint to a later one: MiniCPM's statistics of the decay (2404.06395,
section 4.4), three times.

With v the way, g0 and g1 the gradients at its ends:

    D1 = g1 . v / |v|               the slope at the end
    D2 = (g1 - g0) . v / |v|^2      the mean of v . H v / |v|^2 along the way, exactly
    K  = |D2| / (1 + D1^2)^(3/2)    the curvature of the loss as a curve over the way

The paper does not say whether g0 and g1 are of one batch. If not, D2 contains (difference of two batches) . v / |v|^2,
which grows as 1 / |v| when the steps get shorter. So here: D2 of the same batch, D2 of two different ones, and the
exact v . H v / |v|^2 at the end of the way.

K batches; a stacked tree has them in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from cpmjax.analysis.derivatives import Loss, LossOf, difference, gradients, hvp, inner, products, wide_parameters
from cpmjax.checkpoint.series import Series
from cpmjax.model.parameters import Tree
from cpmjax.run.errors import UserError
from cpmjax.run.table import aligned


@dataclass(frozen=True)
class Secant:
    """From step `first` to step `last`: float64 numbers of each of K batches, or of two."""

    first: int
    last: int
    length: float  # |v|
    losses_K: np.ndarray  # nats a token at the end of the way
    norms_K: np.ndarray  # |g1|
    d1_K: np.ndarray
    cosines_KK: np.ndarray  # of g0 on the first batch and g1 on the second
    d2_KK: np.ndarray  # the same batches; the diagonal is what the paper would have on a fixed batch
    exact_K: np.ndarray | None  # v . H v / |v|^2 at the end of the way

    @property
    def d2_K(self) -> np.ndarray:
        """Of the same batch at both ends."""
        return np.diagonal(self.d2_KK)

    @property
    def different(self) -> np.ndarray:
        """D2 of two different batches, all K (K - 1) pairs of them."""
        return _off_diagonal(self.d2_KK)

    @property
    def cosines_different(self) -> np.ndarray:
        return _off_diagonal(self.cosines_KK)

    @property
    def curvature_K(self) -> np.ndarray:
        """K of the same batch."""
        return curvature(self.d1_K, self.d2_K)

    @property
    def curvature_different(self) -> np.ndarray:
        """K as two different batches show it."""
        return _off_diagonal(curvature(self.d1_K[None, :], self.d2_KK))

    @property
    def noise_share(self) -> float:
        """Of the mean square of D2 from different batches, the share that their difference makes."""
        return 1 - np.mean(self.d2_K) ** 2 / np.mean(self.different**2)


def secants(series: Series, steps: Iterable[int], batches: Any, exact: bool = True) -> Iterator[Secant]:
    """Between neighbours of any ascending steps, one after the other. `batches` are dicts of [K, B, L] arrays
    (`cpmjax.analysis.derivatives.in_batches`), K at least 2; all steps see the same ones.

    Costs K gradients a step and, if `exact`, K Hessian-vector products a way; holds 2 K gradients and two checkpoints.
    """
    return along(Loss.of(series), ((step, wide_parameters(series, step)) for step in steps), batches, exact)


def along(loss: LossOf, points: Iterable[tuple[int, Tree]], batches: Any, exact: bool = True) -> Iterator[Secant]:
    """`secants` of any loss, between neighbours of any points (step, parameters)."""
    before: tuple[int, Tree, Tree] | None = None
    for step, parameters in points:
        losses_K, gradients_K = gradients(loss, parameters, batches)
        if before is not None:
            yield _secant(loss, before, (step, parameters, gradients_K), losses_K, batches, exact)
        before = step, parameters, gradients_K


def curvature(d1: np.ndarray, d2: np.ndarray) -> np.ndarray:
    return np.abs(d2) / (1 + d1**2) ** 1.5


def describe(secants: Iterable[Secant]) -> str:
    """A table, a line a way: means over batches with their standard error, of different batches the standard deviation
    over pairs."""
    rows = [("way", "|v|", "|g1|", "D1", "D2 same batch", "D2 exact", "D2 different batches", "noise")]
    for secant in secants:
        rows.append(
            (
                f"{secant.first} to {secant.last}",
                f"{secant.length:.2f}",
                f"{secant.norms_K.mean():.2f}",
                _mean(secant.d1_K),
                _mean(secant.d2_K),
                "" if secant.exact_K is None else _mean(secant.exact_K),
                f"{secant.different.mean():.4f}, sd {secant.different.std():.4f}",
                f"{secant.noise_share:.0%}",
            )
        )
    return aligned(rows)


def mean_curvature(loss: LossOf, first: Tree, last: Tree, batch: Any, points: int = 5) -> float:
    """The mean of v . H v / |v|^2 along the way by Gauss-Legendre quadrature: D2 of the same batch, found otherwise."""
    way = difference(last, first)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    found = [
        inner(way, hvp(loss, _between(first, way, (1 + node) / 2), way, batch)) * weight / 2
        for node, weight in zip(nodes, weights, strict=True)
    ]
    return float(sum(found) / inner(way, way))


@jax.jit
def _between(first: Tree, way: Tree, share: float) -> Tree:
    return jax.tree.map(lambda x, v: x + share * v, first, way)


@partial(jax.jit, static_argnames="loss")
def _rayleigh(loss: LossOf, parameters: Tree, way: Tree, batches: Any) -> jax.Array:
    """v . H v [K]"""
    return jax.lax.map(lambda batch: inner(way, hvp(loss, parameters, way, batch)), batches)


def _secant(
    loss: LossOf,
    begin: tuple[int, Tree, Tree],
    end: tuple[int, Tree, Tree],
    losses_K: jax.Array,
    batches: Any,
    exact: bool,
) -> Secant:
    (first, at_first, gradients0_K), (last, at_last, gradients1_K) = begin, end
    way = difference(at_last, at_first)
    square = float(inner(way, way))
    if square == 0:
        raise UserError(f"steps {first} and {last} have the same parameters: expected some way between them")
    stacked = jax.tree.map(lambda v: v[None], way)
    along0_K, along1_K = (np.asarray(products(g, stacked), np.float64)[:, 0] for g in (gradients0_K, gradients1_K))
    # Of one batch: the difference first, as both are nearly the same.
    same_K = np.asarray(products(difference(gradients1_K, gradients0_K), stacked), np.float64)[:, 0]
    d2_KK = (along1_K[None, :] - along0_K[:, None]) / square
    np.fill_diagonal(d2_KK, same_K / square)
    norms0_K, norms1_K = (
        np.sqrt(np.diagonal(np.asarray(products(g, g), np.float64))) for g in (gradients0_K, gradients1_K)
    )
    return Secant(
        first=first,
        last=last,
        length=square**0.5,
        losses_K=np.asarray(losses_K, np.float64),
        norms_K=norms1_K,
        d1_K=along1_K / square**0.5,
        cosines_KK=np.asarray(products(gradients0_K, gradients1_K), np.float64) / np.outer(norms0_K, norms1_K),
        d2_KK=d2_KK,
        exact_K=np.asarray(_rayleigh(loss, at_last, way, batches), np.float64) / square if exact else None,
    )


def _mean(values_K: np.ndarray) -> str:
    return f"{values_K.mean():.4f} +- {values_K.std(ddof=1) / len(values_K) ** 0.5:.4f}"


def _off_diagonal(values_KK: np.ndarray) -> np.ndarray:
    return values_KK[~np.eye(len(values_KK), dtype=bool)]
