"""What studies of text share: the rows of a batch a few at a time, and what another draw of rows would have said.

B rows, L tokens a row, K totals of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cpmjax.data.batches import Batch

LEVEL = 0.9  # of an interval


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch of arrays [B, ...] in batches of at most `rows` rows, in order."""
    for start in range(0, len(batch["tokens"]), rows):
        yield {key: values[start : start + rows] for key, values in batch.items()}


def interval(
    totals_BK: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The 5 % and 95 % points of a statistic when rows are drawn again with replacement (Efron 1979).

    Rows and not tokens: those of one document are not independent. `statistic` sees the totals of many draws, [draws,
    K], and gives one value, or one array, for each: a mean loss is the ratio of two totals.
    """
    rows = len(totals_BK)
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=draws)
    found = statistic(counts @ np.asarray(totals_BK, np.float64))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high
