"""Fit of a law with positive parameters to losses that hold outliers: log-Huber, L-BFGS, a grid of starts.

The objective is the sum over observations of Huber(log predicted - log observed; delta = 1e-3), as in Hoffmann et al.
2203.15556: nearly the sum of absolute relative errors. It has local minima, hence the grid. A law is linear in some of
its parameters: for each point of the grid of the others these come from non-negative least squares, so that every start
is already near the data. All arithmetic is float64, switched on here alone.

T observations, P parameters, J the linear ones among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize, nnls

DELTA = 1e-3  # of the logarithm of the loss: errors beyond it count linearly

Parameters = dict[str, float]
Law = Callable[[Mapping[str, jax.Array | float]], jax.Array]  # positive parameters by name -> [T] losses


class RobustFit:
    """A law and what was observed of it; compiled once, solved as often as needed.

    `law` is a pure function of its positive parameters, linear in those named `linear`. `observed_T` is in any unit.
    `bounds` are the least and the greatest value of a parameter, where few losses would let it run away.
    """

    def __init__(
        self,
        law: Law,
        names: Sequence[str],
        linear: Sequence[str],
        observed_T: np.ndarray,
        bounds: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self._bounds = [np.log((bounds or {}).get(name, (1e-20, 1e20))) for name in names]
        self.names, self.linear = tuple(names), tuple(linear)
        self.observed_T = np.asarray(observed_T, np.float64)

        def predicted(log_P: jax.Array) -> jax.Array:
            return law(dict(zip(self.names, jnp.exp(log_P), strict=True)))

        def objective(log_P: jax.Array, weights_T: jax.Array) -> jax.Array:
            # A line search may try negative losses.
            errors_T = jnp.log(jnp.maximum(predicted(log_P), 1e-9)) - np.log(self.observed_T)
            sizes_T = jnp.abs(errors_T) / DELTA
            # A mean, so that the first step, along the gradient, is not beyond all bounds.
            return jnp.mean(weights_T * jnp.where(sizes_T < 1, sizes_T**2 / 2, sizes_T - 0.5)) * DELTA

        self._predicted = jax.jit(predicted)
        self._jacobian = jax.jit(jax.jacfwd(lambda log_P: jnp.log(predicted(log_P))))
        self._objective = jax.jit(jax.value_and_grad(objective))

    def solve(self, grid: Iterable[Parameters], weights_T: np.ndarray | None = None, keep: int = 4) -> Parameters:
        """The best of the minima reached from the `keep` best starts; `grid` gives the parameters that are not linear.

        `weights_T` counts observations, for a bootstrap say; 1 each unless given.
        """
        weights_T = np.ones_like(self.observed_T) if weights_T is None else np.asarray(weights_T, np.float64)
        with jax.enable_x64(True):
            starts = [self._logarithms(self._start(point, weights_T)) for point in grid]
            starts.sort(key=lambda log_P: float(self._objective(log_P, weights_T)[0]))
            found = [self._descend(log_P, weights_T) for log_P in starts[:keep]]
        log_P = min(found)[1]
        return dict(zip(self.names, np.exp(log_P).tolist(), strict=True))

    def refine(self, start: Parameters, weights_T: np.ndarray) -> Parameters:
        """The minimum for other weights that is reached from one found before."""
        with jax.enable_x64(True):
            _, log_P = self._descend(self._logarithms(start), np.asarray(weights_T, np.float64))
        return dict(zip(self.names, np.exp(log_P).tolist(), strict=True))

    def relative_errors(self, parameters: Parameters) -> Parameters:
        """Standard error of each parameter as a share of it; infinite where the observations do not determine it.

        From the Jacobian at the minimum and the spread of the residuals, as if these were independent: a lower bound
        where neighbouring losses err together.
        """
        with jax.enable_x64(True):
            log_P = self._logarithms(parameters)
            jacobian_TP = np.asarray(self._jacobian(log_P))
            errors_T = np.log(self._predicted(log_P)) - np.log(self.observed_T)
        _, sizes, directions = np.linalg.svd(jacobian_TP)
        sizes = np.pad(sizes, (0, len(directions) - len(sizes)))  # fewer observations than parameters
        free = sizes < 1e-7 * sizes[0]
        spread = np.sqrt(np.sum(errors_T**2) / max(1, len(errors_T) - len(sizes)))
        errors_P = spread * np.sqrt(np.sum((directions[~free].T / sizes[~free]) ** 2, axis=1))
        errors_P[np.any(np.abs(directions[free]) > 1e-4, axis=0)] = np.inf
        return dict(zip(self.names, errors_P.tolist(), strict=True))

    def _logarithms(self, parameters: Parameters) -> np.ndarray:
        with np.errstate(divide="ignore"):  # of zero: a term that is not there
            return np.log([parameters[name] for name in self.names])

    def _start(self, point: Parameters, weights_T: np.ndarray) -> Parameters:
        def column(name: str) -> np.ndarray:  # the law's derivative in a linear parameter
            others = dict.fromkeys(self.linear, 0.0)
            return np.asarray(self._predicted(self._logarithms(point | others | {name: 1.0})))

        columns_TJ = np.stack([column(name) for name in self.linear], axis=1)
        scale_T = np.sqrt(weights_T) / self.observed_T  # relative errors
        found, _ = nnls(columns_TJ * scale_T[:, None], self.observed_T * scale_T)
        # A parameter at zero would have no logarithm, and no gradient to come back by: a thousandth of the loss.
        least = 1e-3 * np.median(self.observed_T) / np.maximum(np.abs(columns_TJ).max(axis=0), 1e-12)
        return point | dict(zip(self.linear, np.maximum(found, least).tolist(), strict=True))

    def _descend(self, log_P: np.ndarray, weights_T: np.ndarray) -> tuple[float, list[float]]:
        def objective(log_P: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self._objective(log_P, weights_T)
            return float(value), np.asarray(gradient, np.float64)

        options = {"maxiter": 400, "maxfun": 600, "ftol": 1e-14, "gtol": 1e-11, "maxcor": 20}
        found = minimize(objective, log_P, jac=True, method="L-BFGS-B", bounds=self._bounds, options=options)
        return float(found.fun), found.x.tolist()
