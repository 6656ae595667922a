"""A bowl through noisy losses, a quadratic response surface: where its optimum lies, and how flat it is there.

loss(x) = c + g . x + x A x / 2, with x the octaves (log2) of the parameters from the best trial, by least squares over
the trials that are not far worse than it: near enough for a quadratic, far enough to stand out of the noise. What noise
bends downwards is made flat. The optimum is its lowest point inside the searched ranges.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 200
_NEAR = 0.1  # nats above the best trial; another seed alone makes 0.01 to 0.07
_TRIALS_A_COEFFICIENT = 2  # fewer say nothing


@dataclass(frozen=True)
class Bowl:
    """D parameters, R resamples."""

    centre_D: np.ndarray  # octaves; where x = 0
    constant: float
    slope_D: np.ndarray
    curvature_DD: np.ndarray
    bounds_2D: np.ndarray  # octaves; lowest and highest
    residual: float  # standard deviation of what the bowl leaves of its trials, nats
    trials: int
    optimum_D: np.ndarray  # octaves
    optima_RD: np.ndarray  # of bowls through resampled trials

    def __call__(self, octaves_BD: np.ndarray) -> np.ndarray:
        """Losses [B] at points given in octaves."""
        return _heights(octaves_BD - self.centre_D, self.constant, self.slope_D, self.curvature_DD)

    def line(self, index: int, count: int) -> np.ndarray:
        """Octaves of one parameter from the lowest to the highest."""
        return np.linspace(self.bounds_2D[0, index], self.bounds_2D[1, index], count)

    @property
    def value_D(self) -> np.ndarray:
        """The optimum as values of the parameters."""
        return 2.0**self.optimum_D

    @property
    def interval_2D(self) -> np.ndarray:
        """Values between which 90 % of the resampled optima lie."""
        return 2.0 ** np.quantile(self.optima_RD, [0.05, 0.95], axis=0)

    def octave_costs(self) -> np.ndarray:
        """What a factor of 2 away from the optimum costs, each parameter alone, the mean of both directions [D]."""
        return np.diag(self.curvature_DD) / 2

    def flat_2D(self, nats: float) -> np.ndarray:
        """Values of each parameter alone, the others at the optimum, that cost at most `nats`; cut at the ranges."""
        found = []
        for index in range(len(self.optimum_D)):
            line_BD = np.tile(self.optimum_D, (1001, 1))
            line_BD[:, index] = self.line(index, 1001)
            good = line_BD[self(line_BD) <= self(self.optimum_D[None]) + nats, index]
            found.append((good.min(), good.max()) if good.size else (self.optimum_D[index],) * 2)
        return 2.0 ** np.array(found).T


def fit(values_TD: np.ndarray, losses_T: np.ndarray, bounds_2D: np.ndarray) -> Bowl | None:
    """Of positive values and their losses, which may be infinite. None if too few trials are near the best one."""
    order = np.argsort(losses_T)
    near = order[losses_T[order] <= losses_T[order[0]] + _NEAR]
    size = values_TD.shape[1]
    coefficients = 1 + size + size * (size + 1) // 2
    if len(near) < _TRIALS_A_COEFFICIENT * coefficients:
        return None
    octaves_TD, bounds_2D = np.log2(values_TD[near]), np.log2(bounds_2D)
    centre_D, y_T = octaves_TD[0], losses_T[near]
    x_TD, box_2D = octaves_TD - centre_D, bounds_2D - centre_D
    constant, slope_D, curvature_DD = _coefficients(x_TD, y_T)
    left_T = y_T - _heights(x_TD, constant, slope_D, curvature_DD)
    draws = np.random.default_rng(0).integers(len(y_T), size=(_RESAMPLES, len(y_T)))
    _, slopes, curvatures = zip(*(_coefficients(x_TD[draw], y_T[draw]) for draw in draws), strict=True)
    return Bowl(
        centre_D,
        constant,
        slope_D,
        curvature_DD,
        bounds_2D,
        float(np.sqrt((left_T**2).sum() / (len(y_T) - coefficients))),
        len(y_T),
        centre_D + _lowest(slope_D[None], curvature_DD[None], box_2D)[0],
        centre_D + _lowest(np.array(slopes), np.array(curvatures), box_2D),
    )


def _coefficients(x_TD: np.ndarray, y_T: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Constant, slope and curvature by least squares; the curvature nowhere downwards, the rest then fitted to it."""
    size = x_TD.shape[1]
    first, second = np.triu_indices(size)
    columns = np.concatenate([np.ones((len(x_TD), 1)), x_TD, x_TD[:, first] * x_TD[:, second]], axis=1)
    found = np.linalg.lstsq(columns, y_T, rcond=None)[0]
    half_DD = np.zeros((size, size))
    half_DD[first, second] = found[1 + size :]
    bends_D, directions_DD = np.linalg.eigh(half_DD + half_DD.T)
    curvature_DD = directions_DD * np.maximum(bends_D, 0.0) @ directions_DD.T
    left_T = y_T - _heights(x_TD, 0.0, np.zeros(size), curvature_DD)
    constant, *slope_D = np.linalg.lstsq(columns[:, : 1 + size], left_T, rcond=None)[0]
    return float(constant), np.array(slope_D), curvature_DD


def _heights(x_BD: np.ndarray, constant: float, slope_D: np.ndarray, curvature_DD: np.ndarray) -> np.ndarray:
    return constant + x_BD @ slope_D + np.einsum("bd,de,be->b", x_BD, curvature_DD, x_BD) / 2


def _lowest(slope_RD: np.ndarray, curvature_RDD: np.ndarray, box_2D: np.ndarray) -> np.ndarray:
    """The lowest point of each bowl in a box [R, D]: the lowest of those where it is level along a face of the box,
    the corners and the inside among the faces."""
    count, size = slope_RD.shape
    lowest_R, place_RD = np.full(count, np.inf), np.zeros((count, size))
    for face in itertools.product((0, 1, None), repeat=size):
        free = np.array([side is None for side in face])
        x_RD = np.tile([0.0 if side is None else box_2D[side, d] for d, side in enumerate(face)], (count, 1))
        if free.any():
            level_RF = slope_RD[:, free] + np.einsum("rfd,rd->rf", curvature_RDD[:, free], x_RD)
            x_RD[:, free] = -np.einsum("rfg,rg->rf", np.linalg.pinv(curvature_RDD[:, free][:, :, free]), level_RF)
        inside_R = ((x_RD >= box_2D[0] - 1e-9) & (x_RD <= box_2D[1] + 1e-9)).all(axis=1)
        height_R = np.einsum("rd,rd->r", slope_RD, x_RD) + np.einsum("rd,rde,re->r", x_RD, curvature_RDD, x_RD) / 2
        better_R = inside_R & (height_R < lowest_R)
        lowest_R[better_R], place_RD[better_R] = height_R[better_R], x_RD[better_R]
    return place_RD
