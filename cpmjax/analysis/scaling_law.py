"""The scaling law of model size and data, L(N, D) = C_N N^-a + C_D D^-b + L0, and what it says of a compute budget.

N is parameters without the embedding, D tokens, C = 6 N D floating-point operations. With a budget C the loss is least
at

    N / D = K^2 (C / 6)^eta,    K = (a C_N / (b C_D))^(1 / (a + b)),    eta = (b - a) / (a + b)

(Hu et al. 2404.06395, section 4.5). Constants depend on the unit of N and D, exponents do not: K^2 = 0.01 and
eta = -0.10 as that paper prints them are for N and D in billions (C in 1e18), where they give its D / N = 192 at
C = 4e21; for plain numbers they would give more than 5,000. Its eta is an average over fits, and is not that of its
averaged exponents, (0.23 - 0.29) / (0.23 + 0.29) = -0.115.

T trained models, P parameters of the law, K fits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cpmjax.analysis.robust_fit import RobustFit
from cpmjax.run.errors import UserError


@dataclass(frozen=True)
class ScalingLaw:
    """For N in parameters and D in tokens, plain numbers, unless it was put `in_units`."""

    C_N: float
    a: float
    C_D: float
    b: float
    L0: float

    def loss(self, N: Any, D: Any) -> Any:
        """Of numbers or arrays, in the unit of the fitted losses."""
        return self.C_N * N**-self.a + self.C_D * D**-self.b + self.L0

    @property
    def K(self) -> float:
        return (self.a * self.C_N / (self.b * self.C_D)) ** (1 / (self.a + self.b))

    @property
    def eta(self) -> float:
        return (self.b - self.a) / (self.a + self.b)

    def optimum(self, compute: float) -> tuple[float, float]:
        """(N, D) of the least loss for `compute` = 6 N D, all in the law's unit."""
        product = compute / 6
        ratio = self.K**2 * product**self.eta
        return float(np.sqrt(product * ratio)), float(np.sqrt(product / ratio))

    def in_units(self, unit: float) -> ScalingLaw:
        """The same law for N and D that count `unit`s, and so for compute in unit^2: 1e9 as MiniCPM's paper has it."""
        return dataclasses.replace(self, C_N=self.C_N * unit**-self.a, C_D=self.C_D * unit**-self.b)


def tokens_per_parameter(K2: float, eta: float, compute: float, unit: float = 1.0) -> float:
    """D / N at the optimum of `compute` floating-point operations, for K^2 and eta of N and D that count `unit`s."""
    return (compute / (6 * unit**2)) ** -eta / K2


def fit(N_T: np.ndarray, D_T: np.ndarray, losses_T: np.ndarray) -> ScalingLaw:
    """By log-Huber from a grid of starts. Raises UserError without two sizes, two amounts of data and five losses."""
    problem, unit_N, unit_D = _problem(N_T, D_T, losses_T)
    return _plain(problem.solve(_GRID), unit_N, unit_D)


def fits_without(N_T: np.ndarray, D_T: np.ndarray, losses_T: np.ndarray, left_out_KT: np.ndarray) -> list[ScalingLaw]:
    """The law fitted to what each of K rows of booleans leaves in."""
    problem, unit_N, unit_D = _problem(N_T, D_T, losses_T)
    return [_plain(problem.solve(_GRID, ~left_out_T), unit_N, unit_D) for left_out_T in left_out_KT]


def bootstrap(
    N_T: np.ndarray,
    D_T: np.ndarray,
    losses_T: np.ndarray,
    resamples: int = 200,
    seed: int = 0,
    together_T: np.ndarray | None = None,
) -> list[ScalingLaw]:
    """The law fitted to each of `resamples` drawings, with replacement, of the trained models.

    Percentiles over them, of a parameter or of anything computed from the law, are its bootstrap interval. Models with
    the same value in `together_T`, as the branches of one trunk, which err together, are drawn together. Drawings with
    fewer than two sizes or two amounts of data, which determine no law, are drawn again.
    """
    problem, unit_N, unit_D = _problem(N_T, D_T, losses_T)
    best = problem.solve(_GRID)
    groups, group_T = np.unique(np.arange(len(losses_T)) if together_T is None else together_T, return_inverse=True)
    rng, count = np.random.default_rng(seed), len(groups)
    laws: list[ScalingLaw] = []
    while len(laws) < resamples:
        times_T = np.bincount(rng.integers(0, count, count), minlength=count)[group_T]
        if _determined(N_T[times_T > 0], D_T[times_T > 0]):
            laws.append(_plain(problem.refine(best, times_T), unit_N, unit_D))
    return laws


_EXPONENTS = 0.01, 5.0  # beyond them the data say nothing, and a constant in plain units may overflow
_GRID = [{"a": a, "b": b} for a, b in itertools.product((0.1, 0.2, 0.35, 0.5, 0.8), repeat=2)]


def _problem(N_T: np.ndarray, D_T: np.ndarray, losses_T: np.ndarray) -> tuple[RobustFit, float, float]:
    """With N and D as multiples of their geometric means, so that constants and exponents are hardly correlated."""
    if len(losses_T) < 5 or not _determined(N_T, D_T):
        sizes, amounts = len(set(np.asarray(N_T).tolist())), len(set(np.asarray(D_T).tolist()))
        found = f"{len(losses_T)} losses of {sizes} sizes and {amounts} amounts of data"
        raise UserError(f"scaling law: {found}; expected at least 5 of 2 sizes and 2 amounts")
    unit_N, unit_D = (float(np.exp(np.mean(np.log(values)))) for values in (N_T, D_T))
    n_T, d_T = np.asarray(N_T, np.float64) / unit_N, np.asarray(D_T, np.float64) / unit_D

    def losses(parameters: Mapping[str, Any]) -> jax.Array:
        return ScalingLaw(**parameters).loss(n_T, d_T)

    names = [field.name for field in dataclasses.fields(ScalingLaw)]
    return RobustFit(losses, names, ("C_N", "C_D", "L0"), losses_T, dict.fromkeys("ab", _EXPONENTS)), unit_N, unit_D


def _plain(found: dict[str, float], unit_N: float, unit_D: float) -> ScalingLaw:
    law = ScalingLaw(**found)
    return dataclasses.replace(law, C_N=law.C_N * unit_N**law.a, C_D=law.C_D * unit_D**law.b)


def _determined(N_T: np.ndarray, D_T: np.ndarray) -> bool:
    return len(np.unique(N_T)) > 1 and len(np.unique(D_T)) > 1
