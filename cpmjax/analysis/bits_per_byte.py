"""Bits per byte of a checkpoint on rows of text, with an interval: what depends on no tokenizer, row by row.

B rows, L tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cpmjax.analysis.text import tokenizer_of
from cpmjax.checkpoint.series import Series
from cpmjax.model.loss import batch_losses
from cpmjax.model.transformer import MiniCPM


@dataclass(frozen=True)
class RowBits:
    """float64 [B] each: what predicting a row costs, and how many bytes it decodes to."""

    bits_B: np.ndarray
    bytes_B: np.ndarray

    @property
    def mean(self) -> float:
        """Bits per byte of all rows together."""
        return float(self.bits_B.sum() / self.bytes_B.sum())


def row_bits(series: Series, step: int, batch: dict[str, Any]) -> RowBits:
    """Of a checkpoint on a batch of packed rows, a dict of [B, L] arrays; one forward pass, compiles once a shape."""
    weights_BL = np.asarray(batch["weights"], np.float64)
    lengths_BL = np.asarray(tokenizer_of(series).byte_lengths(), np.float64)[batch["targets"]]
    losses_BL = np.asarray(_losses(series.model(step), batch), np.float64)
    return RowBits((weights_BL * losses_BL).sum(axis=1) / np.log(2), (weights_BL * lengths_BL).sum(axis=1))


@jax.jit
def _losses(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    return batch_losses(model, batch).loss


def interval(rows: RowBits, minus: RowBits | None = None, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % of bits per byte, or of its difference to `minus` on the same rows, over rows drawn with replacement.

    Paired: a drawing takes the same rows of both, so that what makes a row hard for both cancels.
    """
    drawn = np.random.default_rng(seed).integers(0, len(rows.bytes_B), (resamples, len(rows.bytes_B)))
    bits_B = rows.bits_B if minus is None else rows.bits_B - minus.bits_B
    ratios = bits_B[drawn].sum(axis=1) / rows.bytes_B[drawn].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
