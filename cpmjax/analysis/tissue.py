"""The annealing law of Tissue et al. 2408.11029: a loss that falls with the area under the rate, and with its decay.

L(t) = L0 + A S1^-alpha - C S2, with S1 the sum of the rates of the first t updates, and S2 the sum of a momentum of the
drops of the rate, m_k = lambda m_{k-1} + (eta_{k-1} - eta_k): a drop acts over about 1 / (1 - lambda) updates.

S updates, T losses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Tissue:
    """Losses in nats if L0, A and C are; A and C also depend on the unit of the rates."""

    L0: float
    A: float
    alpha: float
    C: float
    memory: float  # updates in which the momentum falls by e; the paper's lambda is exp(-1 / memory)

    linear: ClassVar[tuple[str, ...]] = ("L0", "A", "C")
    annealing: ClassVar[tuple[str, ...]] = ("C", "memory")  # what only a drop of the rate can tell

    @staticmethod
    def bounds(longest: int) -> dict[str, tuple[float, float]]:
        """Of a fit to runs of at most `longest` updates."""
        return {"alpha": (0.01, 2), "memory": (1, longest)}

    @property
    def lam(self) -> float:
        return math.exp(-1 / self.memory)

    @staticmethod
    def prepare(rates_S: np.ndarray, steps_T: np.ndarray, warmup: int) -> dict[str, np.ndarray]:
        """What `loss` needs to know of a schedule; changes within the first `warmup` updates are no drops."""
        drops_S = -np.diff(rates_S, prepend=rates_S[0])
        drops_S[:warmup] = 0
        return {"area_T": np.cumsum(rates_S)[steps_T - 1], "drops_S": drops_S, "last_T": steps_T - 1}

    @staticmethod
    def grid(longest: int) -> Iterator[dict[str, float]]:
        for alpha, memory in itertools.product((0.2, 0.4, 0.7, 1.1), np.geomspace(3, longest, 6)):
            yield {"alpha": alpha, "memory": float(memory)}

    def loss(self, schedule: Mapping[str, Any]) -> jax.Array:
        """[T] losses; a pure function of the parameters, float64 within `jax.enable_x64()`."""
        lam = jnp.exp(-1 / jnp.asarray(self.memory))

        def update(
            carry: tuple[jax.Array, jax.Array], drop: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            momentum = lam * carry[0] + drop
            return (momentum, carry[1] + momentum), carry[1] + momentum

        drops_S = jnp.asarray(schedule["drops_S"])
        nothing = jnp.zeros((), drops_S.dtype)
        annealed_S = jax.lax.scan(update, (nothing, nothing), drops_S, unroll=8)[1]
        annealed_T = annealed_S[schedule["last_T"]]
        return self.L0 + self.A * jnp.asarray(schedule["area_T"]) ** -self.alpha - self.C * annealed_T
