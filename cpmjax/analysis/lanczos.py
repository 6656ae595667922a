"""Eigenvalues of a symmetric operator that is only known by its products with vectors, which are trees of arrays.

Lanczos makes an orthonormal basis q_1 ... q_m of the Krylov space of a start vector, in which the operator is
tridiagonal: alphas on the diagonal, betas beside it. The eigenvalues of that small matrix (Ritz values) soon are the
outermost ones of the operator: one of eigenvector s is within |beta_m s_m| of an eigenvalue (Parlett 1998, section
13.2). Each new vector is made orthogonal to all before it, twice, without which eigenvalues would come up again and
again as ghosts.

M vectors of the basis; a stacked tree has them in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.derivatives import inner, products
from cpmjax.model.parameters import Tree

Operator = Callable[[Tree], Tree]


@dataclass(frozen=True)
class Ritz:
    """What Lanczos found from one start vector: float64 arrays [M], values ascending."""

    values: np.ndarray
    weights: np.ndarray  # square of the first component of each Ritz vector; they sum to 1
    residuals: np.ndarray  # some eigenvalue is that near

    @property
    def top(self) -> float:
        return float(self.values[-1])

    @property
    def bottom(self) -> float:
        return float(self.values[0])


def lanczos(
    operator: Operator, start: Tree, most: int, tolerance: float | None = None, ends: Literal["both", "top"] = "both"
) -> Ritz:
    """At most `most` products with the operator; fewer, once the residuals of the wanted `ends` are at most
    `tolerance` times the largest Ritz value, or where the Krylov space of `start` ends. All vectors are kept:
    `most` times the memory of one.
    """
    norm = jnp.sqrt(inner(start, start))
    vector = jax.tree.map(lambda x: x / norm, start)
    basis_M = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), vector)
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        basis_M = _put(basis_M, len(alphas), vector)
        product = operator(vector)
        alphas.append(float(inner(vector, product)))
        vector, beta = _orthogonal(product, basis_M)
        found = _ritz(alphas, betas, float(beta))
        scale = float(np.abs(found.values).max())
        wanted = found.residuals[[-1] if ends == "top" else [0, -1]]
        ended = float(beta) <= 10 * float(jnp.finfo(beta.dtype).eps) * scale
        converged = tolerance is not None and len(alphas) > 1 and wanted.max() <= tolerance * scale
        if len(alphas) == most or ended or converged:
            return found
        betas.append(float(beta))


@dataclass(frozen=True)
class Density:
    """Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017): each probe's Ritz values are the places, their weights
    the masses of an estimate of the spectrum, a distribution of mass 1."""

    probes: list[Ritz]
    size: int  # eigenvalues there are

    def trace(self) -> tuple[float, float]:
        """(sum of all eigenvalues, its standard error over probes): Hutchinson's estimate with the same probes, as a
        probe's values times weights sum to its first alpha."""
        traces = np.array([self.size * found.values @ found.weights for found in self.probes])
        return float(traces.mean()), float(traces.std(ddof=1) / np.sqrt(len(traces)))

    def on_grid(self, grid: np.ndarray, width: float) -> np.ndarray:
        """Each eigenvalue drawn as a Gaussian of this width (standard deviation): its integral over the grid is 1."""
        kernels = [
            np.exp(-((grid[:, None] - found.values) ** 2) / (2 * width**2)) @ found.weights for found in self.probes
        ]
        return np.mean(kernels, axis=0) / (width * np.sqrt(2 * np.pi))

    def share_below(self, value: float) -> float:
        """Of all eigenvalues, about that share is below a value."""
        return float(np.mean([found.weights[found.values < value].sum() for found in self.probes]))


def spectral_density(operator: Operator, like: Tree, key: jax.Array, probes: int, steps: int) -> Density:
    """`probes` runs of `steps` products each, from vectors of random signs in the shape of `like`."""
    found = [lanczos(operator, random_signs(part, like), steps) for part in jax.random.split(key, probes)]
    return Density(found, sum(leaf.size for leaf in jax.tree.leaves(like)))


def trace(operator: Operator, like: Tree, key: jax.Array, probes: int) -> tuple[float, float]:
    """(trace, standard error) by Hutchinson's estimate: the mean of z . A z over vectors of random signs."""
    signs = (random_signs(part, like) for part in jax.random.split(key, probes))
    found = np.array([float(inner(z, operator(z))) for z in signs])
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(probes))


def random_signs(key: jax.Array, like: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(part, leaf.shape, leaf.dtype) for part, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)


def _ritz(alphas: list[float], betas: list[float], beyond: float) -> Ritz:
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    return Ritz(values, vectors[0] ** 2, np.abs(beyond * vectors[-1]))


@partial(jax.jit, donate_argnums=0)
def _put(basis_M: Tree, place: int, vector: Tree) -> Tree:
    return jax.tree.map(lambda stack, x: stack.at[place].set(x), basis_M, vector)


@jax.jit
def _orthogonal(vector: Tree, basis_M: Tree) -> tuple[Tree, jax.Array]:
    """(What is left of a vector without its parts along the basis, of norm 1; its norm before). Rows of the basis that
    are not there yet are 0, and take nothing."""

    def without(vector: Tree) -> Tree:
        shares_M = products(basis_M, jax.tree.map(lambda x: x[None], vector))[:, 0]
        return jax.tree.map(lambda stack, x: x - jnp.tensordot(shares_M, stack, 1), basis_M, vector)

    vector = without(without(vector))  # the second time, what rounding left the first time
    norm = jnp.sqrt(inner(vector, vector))
    return jax.tree.map(lambda x: x / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny), vector), norm
