"""The multi-power law of Luo et al. 2503.12811: every drop of the rate lowers the loss by a power law of its own.

L(t) = L0 + A S1(t)^-alpha - B sum_{k<=t} (eta_{k-1} - eta_k) G(eta_k^-gamma S_k(t)), G(x) = 1 - (1 + C x)^-beta, with
S1(t) the sum of the rates of the first t updates (the warm-up's are the paper's S_W) and S_k(t) of those from k to t.
The parameters that the authors publish were fitted with the rises of the warm-up counted as negative drops (`warmup` 0
below); their paper leaves them out.

S updates, T losses, K updates at which the rate differs from the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class MultiPower:
    """Losses in nats if L0, A and B are; A, B and C also depend on the unit of the rates."""

    L0: float
    A: float
    alpha: float
    B: float
    C: float
    beta: float
    gamma: float

    linear: ClassVar[tuple[str, ...]] = ("L0", "A", "B")
    annealing: ClassVar[tuple[str, ...]] = ("B", "C", "beta", "gamma")  # what only a drop of the rate can tell

    @staticmethod
    def prepare(rates_S: np.ndarray, steps_T: np.ndarray, warmup: int) -> dict[str, np.ndarray]:
        """What `loss` needs to know of a schedule; changes within the first `warmup` updates are no drops."""
        area_S = np.cumsum(rates_S)
        drops_S = -np.diff(rates_S, prepend=rates_S[0])
        drops_S[:warmup] = 0
        changed_K = np.flatnonzero(drops_S)
        # A rate of 0 has no power: from there on nothing is learnt, and what it dropped never acts.
        changed_K = changed_K[rates_S[changed_K] > 0]
        return {
            "area_T": area_S[steps_T - 1],
            "last_T": steps_T - 1,
            "changed_K": changed_K,
            "rate_K": rates_S[changed_K],
            "drop_K": drops_S[changed_K],
            "before_K": area_S[changed_K] - rates_S[changed_K],
        }

    @staticmethod
    def bounds(longest: int) -> dict[str, tuple[float, float]]:
        """Of a fit to runs of at most `longest` updates, at rates whose peak is 1."""
        return {"alpha": (0.01, 2), "C": (0.1 / longest, 10), "beta": (0.05, 2), "gamma": (0.05, 2)}

    @staticmethod
    def grid(longest: int) -> Iterator[dict[str, float]]:
        # G has come half way after half to twice `reach` updates at the peak, of rate 1 in a fit.
        for alpha, reach, beta, gamma in itertools.product(
            (0.25, 0.5, 1.0), np.geomspace(3, longest / 2, 4), (0.4, 1.0), (0.3, 0.8)
        ):
            yield {"alpha": alpha, "C": 2 / float(reach), "beta": beta, "gamma": gamma}

    def loss(self, schedule: Mapping[str, Any]) -> jax.Array:
        """[T] losses; a pure function of the parameters, float64 within `jax.enable_x64()`."""

        @jax.checkpoint  # without it a gradient would keep T x K numbers several times over
        def fallen(at: tuple[jax.Array, jax.Array]) -> jax.Array:
            area, last = at
            # Drops yet to come have no area: the maximum keeps their power, which is not used, a number.
            area_K = jnp.maximum(area - schedule["before_K"], 0)
            share_K = 1 - (1 + self.C * schedule["rate_K"] ** -self.gamma * area_K) ** -self.beta
            return jnp.sum(jnp.where(schedule["changed_K"] <= last, schedule["drop_K"] * share_K, 0))

        at_T = (jnp.asarray(schedule["area_T"]), jnp.asarray(schedule["last_T"]))
        fallen_T = jax.lax.map(fallen, at_T, batch_size=16)
        return self.L0 + self.A * schedule["area_T"] ** -self.alpha - self.B * fallen_T
