"""Where checkpoints lie to each other: their inner products, from which every distance, angle and projection follows.

N checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpmjax.model.weights import Weights, slice_shape
from cpmjax.run.errors import UserError

_AT_ONCE = 1 << 30  # bytes of one slice of all checkpoints, as they are stored
_COLUMNS = 1 << 18  # of them at one time in float64


def inner_products(checkpoints: Sequence[Weights]) -> np.ndarray:
    """float64 [N, N]: inner products of the displacements from the first checkpoint, over all parameters.

    Reads slice by slice; a slice that is over 1 GiB in all checkpoints together, in parts of its rows, and again for
    each part. What follows from inner products of displacements is exact to about 1e-8 of their length.
    """
    gram_NN = np.zeros((len(checkpoints), len(checkpoints)))
    for path, layer in checkpoints[0].slices():
        rows, *row = slice_shape(checkpoints[0].specs[path])
        row_bytes = math.prod(row) * sum(each.dtypes[path].itemsize for each in checkpoints)
        part = max(1, _AT_ONCE // row_bytes)
        for start in range(0, rows, part):
            # Copied, since a part would keep the whole in memory.
            stored = [each.read(path, layer)[start : start + part].flatten() for each in checkpoints]
            for column in range(0, len(stored[0]), _COLUMNS):
                values_NC = np.stack([each[column : column + _COLUMNS] for each in stored]).astype(np.float64)
                moved_NC = values_NC - values_NC[0]
                gram_NN += moved_NC @ moved_NC.T
    return gram_NN


def of_mixtures(gram_NN: np.ndarray, coefficients_MN: np.ndarray) -> np.ndarray:
    """Inner products [M, M] of M mixtures of the checkpoints, whose coefficients sum to 1, from those of N."""
    return coefficients_MN @ gram_NN @ coefficients_MN.T


def random_walk(count: int) -> np.ndarray:
    """Inner products [N, N] of the places of a walk with independent steps of one size: what no drift looks like."""
    places = np.arange(count, dtype=np.float64)
    return np.minimum(places[:, None], places)


@dataclass(frozen=True)
class Straightness:
    """How near to one line points lie, one after another."""

    cosines: np.ndarray  # [N - 2], between each displacement and the next
    first_component: float  # share of their variance along its first principal component


def straightness(gram_NN: np.ndarray) -> Straightness:
    """Of N points with these inner products, 3 or more. Raises UserError for fewer."""
    if len(gram_NN) < 3:
        raise UserError(f"{len(gram_NN)} points: expected at least 3, which may be on a line or not")
    steps_MM = np.diff(np.diff(gram_NN, axis=0), axis=1)
    lengths = np.sqrt(np.diag(steps_MM))
    centred_NN = gram_NN - gram_NN.mean(0) - gram_NN.mean(1)[:, None] + gram_NN.mean()
    spectrum = np.linalg.eigvalsh(centred_NN)
    return Straightness(np.diag(steps_MM, 1) / (lengths[:-1] * lengths[1:]), spectrum[-1] / spectrum.sum())


@dataclass(frozen=True)
class Plane:
    """Through three of N checkpoints; its first axis goes from the first to the second."""

    anchors: tuple[int, int, int]
    places_N2: np.ndarray  # of every checkpoint's projection, in units of parameter space; the first anchor is (0, 0)
    residuals_N: np.ndarray  # how far each is from the plane

    @classmethod
    def through(cls, gram_NN: np.ndarray, anchors: tuple[int, int, int]) -> Plane:
        """From inner products of displacements. Raises UserError if the anchors are on a line."""
        a, b, c = anchors
        from_a = gram_NN - gram_NN[a] - gram_NN[:, [a]] + gram_NN[a, a]
        if not from_a[b, b] * from_a[c, c] - from_a[b, c] ** 2 > 1e-12 * from_a[b, b] * from_a[c, c]:
            raise UserError(f"checkpoints {a}, {b}, {c} are on a line: expected three that span a plane")
        x_N = from_a[b] / np.sqrt(from_a[b, b])
        y_N = (from_a[c] - x_N[c] * x_N) / np.sqrt(from_a[c, c] - x_N[c] ** 2)
        residuals_N = np.sqrt(np.maximum(0, np.diag(from_a) - x_N**2 - y_N**2))
        return cls(anchors, np.stack([x_N, y_N], axis=1), residuals_N)

    def mixtures(self, points_P2: np.ndarray) -> np.ndarray:
        """[P, 3]: how much of each anchor makes each point of the plane; the three sum to 1."""
        _, (side, _), (foot, height) = self.places_N2[list(self.anchors)]
        third = points_P2[:, 1] / height
        second = (points_P2[:, 0] - third * foot) / side
        return np.stack([1 - second - third, second, third], axis=1)

    def grid(self, x: int, y: int, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [X] and [Y] that cover all projections, and so much of their extent beyond them."""
        low, high = self.places_N2.min(0), self.places_N2.max(0)
        room = margin * (high - low)
        return np.linspace(low[0] - room[0], high[0] + room[0], x), np.linspace(low[1] - room[1], high[1] + room[1], y)
