"""What the layers represent, and how it moves: linear CKA between checkpoints, and the loss that a lens sees.

Linear CKA (Kornblith et al. 2019) of two sets of features of the same tokens, X [n, D] and Y [n, E], both centred:

    CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)),  HSIC(X, Y) = ||X'Y||^2

It does not see rotations of the features, nor their scale. This HSIC is biased upwards: features that have nothing in
common give about D / n and more. The debiased one (Song et al. 2012, of the kernels XX' and YY') gives 0 on average, if
tokens are independent, which those of one text are not quite.

B rows, L tokens a row, D and E widths of features, N layers, S depths: the embedding, each layer, the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.excerpts import parts
from cpmjax.checkpoint.series import Series
from cpmjax.data.batches import Batch
from cpmjax.model.loss import token_losses
from cpmjax.model.transformer import MiniCPM, rms_norm
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

_TOKENS = 1024  # of a minibatch of features in memory


def depths(config: ModelConfig) -> list[str]:
    """The names of the S = N + 2 places whose hidden states are studied."""
    return ["embedding", *(f"layer {layer}" for layer in range(config.layers)), "final norm"]


@jax.jit
def hidden_states(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    """float32 [S, B, L, D]: the residual stream from the embedding to the last layer, then what the head reads."""
    x_BLD = model.embed(batch["tokens"])
    final_BLD, tapped = model.trunk(x_BLD, batch["positions"], batch["segments"], ("residual",))
    return jnp.concatenate([x_BLD[None], tapped["residual"], final_BLD[None]]).astype(jnp.float32)


def features(model: MiniCPM, batch: Batch, rows: int = 8) -> np.ndarray:
    """float32 [S, n, D] on the host: the hidden states of the n tokens that are no padding, `rows` rows at a time."""
    found = [np.asarray(hidden_states(model, part))[:, part["segments"] > 0] for part in parts(batch, rows)]
    return np.concatenate(found, axis=1)


# The similarity of two sets of features.


@jax.jit
def _sums(x_nD: jax.Array, y_nE: jax.Array) -> dict[str, jax.Array]:
    with jax.default_matmul_precision("highest"):
        xx_n, yy_n = jnp.sum(x_nD**2, axis=1), jnp.sum(y_nE**2, axis=1)
        return {
            "x": jnp.sum(x_nD, axis=0),
            "y": jnp.sum(y_nE, axis=0),
            "xy": x_nD.T @ y_nE,
            "xx": jnp.sum(xx_n),
            "yy": jnp.sum(yy_n),
            "xxyy": jnp.sum(xx_n * yy_n),
            "xx y": xx_n @ y_nE,
            "yy x": yy_n @ x_nD,
        }


class HSIC:
    """HSIC with linear kernels, summed in feature space: tokens stream, and [D, E] is all that is ever held.

    `add` minibatches of the same tokens; the sums of each are float32, and their sum is float64. Features are taken
    relative to the mean of the first minibatch, so that little is left to cancel.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: dict[str, np.ndarray] = {}

    def add(self, x_nD: np.ndarray, y_nE: np.ndarray) -> None:
        if not self.tokens:
            self._origins = x_nD.mean(axis=0), y_nE.mean(axis=0)
        found = _sums(x_nD - self._origins[0], y_nE - self._origins[1])
        self.tokens += len(x_nD)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)

    def value(self, debiased: bool = True) -> float:
        """Up to a factor that only depends on the number of tokens, and is the same for both kinds."""
        n, s = self.tokens, self._sums
        if n < 4:
            raise UserError(f"HSIC of {n} tokens; expected at least 4")
        mean_x, mean_y = s["x"] / n, s["y"] / n
        biased = float(np.sum((s["xy"] - n * np.outer(mean_x, mean_y)) ** 2))
        if not debiased:
            return biased
        x2, y2 = mean_x @ mean_x, mean_y @ mean_y
        # Without the diagonals of the kernels: |x|^2 |y|^2 of each token, about the means, written out.
        diagonal = s["xxyy"] - 2 * mean_y @ s["xx y"] - 2 * mean_x @ s["yy x"] + 4 * mean_x @ s["xy"] @ mean_y
        diagonal += x2 * s["yy"] + y2 * s["xx"] - 3 * n * x2 * y2
        traces = (s["xx"] - n * x2) * (s["yy"] - n * y2)
        return float(biased - n / (n - 2) * diagonal + traces / ((n - 1) * (n - 2)))


def hsic(x_nD: np.ndarray, y_nE: np.ndarray, debiased: bool = True) -> float:
    """Of features that are in memory, by minibatches."""
    total = HSIC()
    for start in range(0, len(x_nD), _TOKENS):
        total.add(x_nD[start : start + _TOKENS], y_nE[start : start + _TOKENS])
    return total.value(debiased)


def cka(x_nD: np.ndarray, y_nE: np.ndarray, debiased: bool = True) -> float:
    """1 for features that are equal up to rotation, scale and a shift."""
    return float(cka_matrix([x_nD, y_nE], debiased)[0, 1])


def cka_matrix(sets: Sequence[np.ndarray], debiased: bool = True) -> np.ndarray:
    """float64 [P, P]: the CKA of each pair of P sets of features [n, D] of the same tokens."""
    found = np.empty((len(sets), len(sets)))
    for i, x_nD in enumerate(sets):
        for j in range(i, len(sets)):
            found[i, j] = found[j, i] = hsic(x_nD, sets[j], debiased)
    scale = np.sqrt(np.diag(found))
    return found / np.outer(scale, scale)


def drift(
    series: Series, steps: Sequence[int], reference: int, batch: Batch, debiased: bool = True, rows: int = 8
) -> np.ndarray:
    """float64 [steps, S]: the CKA of each depth at each step with the same depth at the step `reference`.

    In memory are two checkpoints, the hidden states of `rows` rows, and three sums [D, D] in float64 for each depth.
    """
    fixed = series.model(reference)
    found = []
    for step in steps:
        moved = series.model(step)
        sums = [[HSIC() for _ in range(3)] for _ in depths(series.config.model)]
        for part in parts(batch, rows):
            for pair, x_nD, y_nD in zip(sums, features(fixed, part, rows), features(moved, part, rows), strict=True):
                for total, (left, right) in zip(pair, [(x_nD, y_nD), (x_nD, x_nD), (y_nD, y_nD)], strict=True):
                    total.add(left, right)
        values = np.array([[total.value(debiased) for total in pair] for pair in sums])
        found.append(values[:, 0] / np.sqrt(values[:, 1] * values[:, 2]))
    return np.array(found)


# The logit lens (nostalgebraist 2020): what the head would say if the network ended here.


def lens(model: MiniCPM, x_BLD: jax.Array) -> jax.Array:
    """Hidden states -> float32 logits [B, L, V], through the final norm, the muP scale 1/m and the (tied) head.

    After the last layer these are the logits of the model. Without 1/m they would be m times as sharp.
    """
    return model.head(_read(model, x_BLD))


@jax.jit
def lens_losses(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    """float32 [N + 1, B, L]: nats of each target under the lens after the embedding and each layer.

    The last is the loss of the model. One depth at a time, and of its logits a chunk of tokens.
    """
    states = hidden_states(model, batch)[:-1].astype(model.compute.dtype)
    return jax.lax.map(lambda x_BLD: token_losses(model, _read(model, x_BLD), batch["targets"]).loss, states)


def _read(model: MiniCPM, x_BLD: jax.Array) -> jax.Array:
    return rms_norm(model.parameters["final_norm"], x_BLD, model.config.norm_epsilon)


def lens_rows(model: MiniCPM, batch: Batch, rows: int = 8) -> np.ndarray:
    """float64 [B, N + 1]: nats in each row under the lens at each depth, summed over its weighted tokens."""
    found = [
        np.einsum("sbl,bl->bs", np.asarray(lens_losses(model, part), np.float64), part["weights"])
        for part in parts(batch, rows)
    ]
    return np.concatenate(found)
