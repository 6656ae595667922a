"""The last-iterate bound of convex optimisation as a law: Schaipp et al. 2501.18965, after Defazio et al. 2310.07831.

For SGD with rates eta_1 .. eta_t on a convex function whose gradients have norm G, from a distance D to the minimum:

    L(t) - L* <= D^2 / (2 sum_k eta_k) + sum_k eta_k^2 G^2 / (2 sum_k eta_k)
                 + 1/2 sum_{k<t} eta_k / (sum_{j>k} eta_j) (sum_{j>=k} eta_j^2 G^2) / (sum_{j>=k} eta_j)

No part of it is about language models; L*, D and G are fitted. Unlike the other laws it has nothing of its own for the
decay: what it says of one follows from the loss at a constant rate.

S updates, T losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class ConvexBound:
    """D2 and G2 are the squares of D and G; both also depend on the unit of the rates."""

    L0: float
    D2: float
    G2: float

    linear: ClassVar[tuple[str, ...]] = ("L0", "D2", "G2")
    annealing: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def prepare(rates_S: np.ndarray, steps_T: np.ndarray, warmup: int) -> dict[str, np.ndarray]:
        """What `loss` needs to know of a schedule: the two terms for D = 1 and G = 1. The warm-up counts in full."""
        distance_T, noise_T = np.transpose([terms(rates_S[:steps]) for steps in steps_T])
        return {"distance_T": distance_T, "noise_T": noise_T}

    @staticmethod
    def bounds(longest: int) -> dict[str, tuple[float, float]]:
        return {}

    @staticmethod
    def grid(longest: int) -> Iterator[dict[str, float]]:
        yield {}

    def loss(self, schedule: Mapping[str, Any]) -> jax.Array:
        """[T] losses; a pure function of the parameters, float64 within `jax.enable_x64()`."""
        return self.L0 + self.D2 * jnp.asarray(schedule["distance_T"]) + self.G2 * jnp.asarray(schedule["noise_T"])


def terms(rates: np.ndarray) -> tuple[float, float]:
    """What D^2 and G^2 are multiplied by in the bound after updates with these rates; the last is positive."""
    rates = np.asarray(rates, np.float64)
    rates = rates[: np.flatnonzero(rates)[-1] + 1]  # updates at rate 0 change nothing
    area = np.cumsum(rates[::-1])[::-1]  # of this update and those after it
    squares = np.cumsum(rates[::-1] ** 2)[::-1]
    tail = np.sum(rates[:-1] / area[1:] * squares[:-1] / area[:-1])
    return float(1 / (2 * area[0])), float((squares[0] / area[0] + tail) / 2)


def best_scale(rates: np.ndarray, distance: float = 1.0, gradient: float = 1.0) -> tuple[float, float]:
    """(factor on all rates that makes the bound least, the bound with it)."""
    over, under = terms(rates)
    return distance / gradient * float(np.sqrt(over / under)), 2 * distance * gradient * float(np.sqrt(over * under))
