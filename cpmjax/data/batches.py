"""Position -> packed rows: tokens, targets, positions, segment ids and loss weights.

B rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import grain
import numpy as np

from cpmjax.data.mixture import Mixture
from cpmjax.data.tokens import Split
from cpmjax.run.errors import UserError

Batch = dict[str, np.ndarray]


class Rows:
    """A split cut into rows: row i reads tokens i*L to i*L + L and predicts each one's successor.

    With a seed the rows are training data: each epoch has its own order, and the tokens after the last full row are
    dropped. Without one they are held-out data, in natural order, and the last row is padded.
    """

    def __init__(self, split: Split, length: int, seed: int | None) -> None:
        """Raises UserError if the split has too few tokens for one row. 0 <= seed < 2**32."""
        self.length = length
        self._tokens = np.asarray(split.tokens)
        self._offsets = np.asarray(split.offsets)
        predictions = len(self._tokens) - 1
        self.rows = predictions // length if seed is not None else -(-predictions // length)
        if self.rows < 1:
            size = f"{len(self._offsets) - 1} documents with {len(self._tokens)} tokens"
            raise UserError(
                f"corpus {split.name}: {size}; "
                + (
                    "expected at least one document: raise data.held_out, or add documents"
                    if seed is None
                    else f"expected at least the {length + 1} of one row: add text, or lower data.sequence_length"
                )
            )
        self._order = None if seed is None else grain.MapDataset.range(self.rows).seed(seed).shuffle().repeat()

    def row(self, index: int) -> Batch:
        """Arrays [L] of the index-th row consumed; epoch index // rows is shuffled afresh.

        tokens, targets   int32
        positions         int32, from 0 in each document of the row
        segments          int32, 1 for the first document in the row, 2 for the next, ...; 0 is padding
        weights           float32, 1 where the target belongs to the same document as the token, else 0
        """
        start = int(index if self._order is None else self._order[index]) * self.length
        window = self._tokens[start : start + self.length + 1]
        documents = np.searchsorted(self._offsets, np.arange(start, start + len(window)), side="right") - 1
        places = np.arange(start, start + len(window) - 1)
        values = {
            "tokens": window[:-1],
            "targets": window[1:],
            "positions": places - np.maximum(self._offsets[documents[:-1]], start),
            "segments": documents[:-1] - documents[0] + 1,
            "weights": documents[:-1] == documents[1:],
        }
        row = {key: np.zeros(self.length, np.float32 if key == "weights" else np.int32) for key in values}
        for key, array in row.items():
            array[: len(places)] = values[key]
        return row


class Batches:
    """The training data of a run: `batches(position, size)` gives rows position to position + size as arrays [B, L]."""

    def __init__(self, mixture: Mixture, rows: Mapping[str, Rows]) -> None:
        self._mixture = mixture
        self._rows = rows

    def __call__(self, position: int, size: int) -> Batch:
        located = [self._mixture.locate(place) for place in range(position, position + size)]
        return _stack([self._rows[corpus].row(index) for corpus, index in located])


def held_out_batches(rows: Rows, limit: int, size: int) -> Iterator[Batch]:
    """The first `limit` rows (or all there are) in batches [size, L]; the last one is filled up with padding."""
    count = min(limit, rows.rows)
    for start in range(0, count, size):
        batch = _stack([rows.row(index) for index in range(start, min(start + size, count))])
        padding = size - len(batch["tokens"])
        yield {key: np.pad(values, ((0, padding), (0, 0))) for key, values in batch.items()}


def _stack(rows: list[Batch]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
