"""How sharp the minimum is at a checkpoint: the spectrum of the Hessian of the loss on given rows, as it is, and as
Adam sees it.

Adam with a diagonal P moves by -learning_rate * P^-1 * (mean of gradients): along an eigenvector of P^-1 H, which has
the eigenvalues of the symmetric P^-1/2 H P^-1/2, gradients that are averaged with beta1 are stable up to

    (2 + 2 beta1) / ((1 - beta1) learning_rate), which is 38 / learning_rate at beta1 = 0.9

(Cohen et al. 2207.14484). P of an entry of parameter i, from `cpmjax.training.optimizer`:

    P = epsilon_i * (sqrt(nu / (1 - beta2^count)) + epsilon) / rate_i

with nu the second moments at the checkpoint, epsilon_i and rate_i the multipliers of its class under muP: the rate that
remains, the threshold's, is that of the schedule, at the base width. Left out: weight decay, and the clip, which where
it is at work makes steps shorter than this (nu is that of clipped gradients).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from cpmjax.analysis import lanczos
from cpmjax.analysis.derivatives import Loss, mean_ggn, mean_hvp, wide_parameters
from cpmjax.checkpoint.series import Series
from cpmjax.model import mup
from cpmjax.model.parameters import Tree
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import AdamW


@dataclass(frozen=True)
class Sharpness:
    """The outermost eigenvalues of a checkpoint's Hessian; a residual says how near an eigenvalue certainly is."""

    step: int
    top: float
    top_residual: float
    bottom: float
    bottom_residual: float
    products: int  # Hessian-vector products that it took


def hessian(series: Series, step: int, batches: Any) -> lanczos.Operator:
    """v -> H v of the mean loss over all tokens of batches [K, B, L], one batch at work at a time."""
    loss, parameters = Loss.of(series), wide_parameters(series, step)
    return lambda vector: mean_hvp(loss, parameters, vector, batches)


def gauss_newton(series: Series, step: int, batches: Any) -> lanczos.Operator:
    """v -> G v, the part of H that is never negative (`mean_ggn`)."""
    loss, parameters = Loss.of(series), wide_parameters(series, step)
    return lambda vector: mean_ggn(loss, parameters, vector, batches)


def preconditioned(operator: lanczos.Operator, p: Tree) -> lanczos.Operator:
    """v -> P^-1/2 A P^-1/2 v"""
    root = jax.tree.map(lambda x: x**-0.5, p)

    def scaled(vector: Tree) -> Tree:
        return jax.tree.map(jnp.multiply, root, vector)

    return lambda vector: scaled(operator(scaled(vector)))


def preconditioner(series: Series, step: int) -> Tree | None:
    """P of each entry, see above; None if the checkpoint has no optimizer state. Raises UserError if the state is not
    AdamW's, or at rest in 8 bits."""
    config = series.config.optimizer
    state = series.optimizer_state(step)
    if state is None:
        return None
    if not isinstance(config, AdamW) or config.state_dtype == "int8":
        raise UserError(
            f"{series.path}: its optimizer is {type(config).__name__}, state_dtype {config.state_dtype}; "
            "expected AdamW with moments in float32 or bfloat16"
        )
    moments = _adam(state)
    correction = 1 - config.beta2 ** float(moments["count"])

    def leaf(nu: jax.Array, scale: mup.LeafScales) -> jax.Array:
        root = jnp.sqrt(nu.astype(jnp.float32) / correction)
        return scale.epsilon * (root + config.epsilon) / scale.rate

    return jax.tree.map(leaf, moments["nu"], mup.scales(series.config.model, config).leaves)


def threshold(series: Series, step: int) -> float | None:
    """What the largest eigenvalue of P^-1/2 H P^-1/2 may be at the learning rate of a step; None where nobody knows it,
    or it is 0."""
    rate, config = series.learning_rate(step), series.config.optimizer
    if not rate or not isinstance(config, AdamW):
        return None
    return (2 + 2 * config.beta1) / ((1 - config.beta1) * rate)


def outermost(
    operator: lanczos.Operator,
    like: Tree,
    step: int,
    most: int = 60,
    tolerance: float = 0.01,
    ends: Literal["both", "top"] = "both",
) -> Sharpness:
    """By Lanczos, from a vector of random signs in the shape of `like`, until the residuals of the wanted ends are at
    most `tolerance` times the largest eigenvalue, or after `most` products: look at the residuals."""
    found = lanczos.lanczos(operator, lanczos.random_signs(jax.random.key(0), like), most, tolerance, ends)
    top, bottom = (float(residual) for residual in found.residuals[[-1, 0]])
    return Sharpness(step, found.top, top, found.bottom, bottom, len(found.values))


def _adam(state: Tree) -> Tree:
    """{"count", "mu", "nu"}, the part of Adam in the state of a whole chain, nested dicts; {} if there is none."""
    if "nu" in state:
        return state
    return next((found for part in state.values() if isinstance(part, dict) and (found := _adam(part))), {})
