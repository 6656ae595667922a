"""Position -> corpus and index: which rows a run sees, as a pure function of the seed and the stage boundaries."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cpmjax.run.errors import UserError

BLOCK = 1024  # rows in which a segment's weights hold exactly


@dataclass(frozen=True)
class Segment:
    """A stretch of the run in which the weights stay the same."""

    rows: int | None  # None: to the end of the run
    weights: dict[str, float]  # corpus -> share of the rows, in any unit


def run_out(segments: Sequence[Segment], seed: int, limits: Mapping[str, int], end: int) -> list[Segment]:
    """The segments of a run of `end` rows, cut wherever a corpus has been read to its limit (in rows).

    From there on it has no weight, so that the others share its rows as they share theirs. Raises UserError if none
    is left before the end. Where a cut lies depends on nothing that comes after it, so a branch still replays its
    trunk.
    """
    cut: list[Segment] = []
    start = 0
    for segment in segments:
        last = end if segment.rows is None else start + segment.rows
        stop = min(last, end)
        weights = segment.weights
        while start < stop:
            mixture = Mixture([*cut, Segment(None, weights)], seed)
            read = mixture.counts(start)
            left = {name: weight for name, weight in weights.items() if read[name] < limits.get(name, math.inf)}
            if not left:
                names = ", ".join(segment.weights)
                raise UserError(
                    f"data.corpora: at row {start:,} of {end:,} each of {names} has been read to its end; "
                    f"expected more text, a shorter schedule, or one with on_end: repeat"
                )
            if left != weights:
                weights = left
                continue
            ends = [_first(mixture, start, stop, name, limits[name]) for name in weights if name in limits]
            here = min([stop, *ends])
            if here == stop:
                break
            cut.append(Segment(here - start, weights))
            start = here
        cut.append(Segment(None if segment.rows is None else last - start, weights))
        start = last
    return cut


def _first(mixture: Mixture, start: int, stop: int, name: str, rows: int) -> int:
    """The first position from start to stop before which a corpus has so many rows; stop if there is none."""
    return start + bisect_left(range(start, stop), rows, key=lambda position: mixture.counts(position)[name])


class Mixture:
    """The rows of each corpus in the order in which a run consumes them.

    A segment is cut into blocks of 1024 rows. Each block holds every corpus as often as its weight says, rounded by
    largest remainder, in an order drawn from (seed, segment, block). Nothing depends on how long a segment is, so a
    run whose segments begin like another's replays it up to the first boundary that differs.
    """

    def __init__(self, segments: Sequence[Segment], seed: int) -> None:
        """`seed` is not negative. The last segment goes on for as long as it is asked for rows."""
        self.corpora = tuple(sorted({name for segment in segments for name in segment.weights}))
        self._seed = seed
        self._per_block = [self._largest_remainder(segment.weights) for segment in segments]
        self._starts = [0]  # position at which each segment begins
        self._before = [np.zeros(len(self.corpora), np.int64)]  # rows of each corpus consumed by then
        # Blocks are kept as they are read in order by a few threads; 16 of them take 200 kB.
        self._block = lru_cache(maxsize=16)(self._draw_block)
        for segment in segments[:-1]:
            if segment.rows is None:
                break
            end = self._starts[-1] + segment.rows
            consumed = self._counts(len(self._starts) - 1, end)
            self._starts.append(end)
            self._before.append(consumed)

    def locate(self, position: int) -> tuple[str, int]:
        """The corpus of a row, and how many rows of that corpus come before it in the whole run."""
        segment = bisect_right(self._starts, position) - 1
        block, offset = divmod(position - self._starts[segment], BLOCK)
        order, ranks = self._block(segment, block)
        corpus = order[offset]
        index = self._before[segment][corpus] + block * self._per_block[segment][corpus] + ranks[offset]
        return self.corpora[corpus], int(index)

    def counts(self, position: int) -> dict[str, int]:
        """Rows of each corpus consumed before a position."""
        counts = self._counts(bisect_right(self._starts, position) - 1, position)
        return dict(zip(self.corpora, counts.tolist(), strict=True))

    def _counts(self, segment: int, position: int) -> np.ndarray:
        block, offset = divmod(position - self._starts[segment], BLOCK)
        counts = self._before[segment] + block * self._per_block[segment]
        if offset:
            counts = counts + np.bincount(self._block(segment, block)[0][:offset], minlength=len(self.corpora))
        return counts

    def _draw_block(self, segment: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [BLOCK] twice: the corpus of each row, and how many rows of it come before in the block."""
        per_block = self._per_block[segment]
        order = np.random.default_rng((self._seed, segment, block)).permutation(
            np.repeat(np.arange(len(per_block)), per_block)
        )
        ranks = np.empty_like(order)
        for corpus, rows in enumerate(per_block):
            ranks[order == corpus] = np.arange(rows)
        return order, ranks

    def _largest_remainder(self, weights: dict[str, float]) -> np.ndarray:
        """int64 [corpora]: rows of each corpus in a block."""
        total = sum(weights.values())
        for name, weight in weights.items():
            if weight * BLOCK < total:
                raise UserError(
                    f"corpus {name}: a weight of {weight:g} is less than one row in {BLOCK}; "
                    f"expected at least {total / BLOCK:g}, or no such corpus"
                )
        quotas = np.array([weights.get(name, 0) * BLOCK / total for name in self.corpora])
        rows = np.floor(quotas).astype(np.int64)
        rows[np.argsort(rows - quotas, kind="stable")[: BLOCK - rows.sum()]] += 1
        return rows
