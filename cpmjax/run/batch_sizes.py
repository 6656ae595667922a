"""How many rows each step takes: the stages of a warm-up of the batch, then one size to the end.

MiniCPM-1.2B went from batches of 2 M tokens to batches of 4 M (Hu et al. 2404.06395, section 6.2). Steps are counted as
in `cpmjax.run.schedule`: update s, from 1, takes size(s) rows, and after it rows(s) have been consumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class BatchSizes:
    final: int  # rows
    row_tokens: int = 1
    warmup: tuple[tuple[int, int], ...] = ()  # (rows, steps) of each stage before `final` holds

    @classmethod
    def counted(
        cls, final: int, row_tokens: int, warmup: Sequence[tuple[int, int]], unit: Literal["steps", "tokens"]
    ) -> Self:
        """From stages whose lengths count `unit`. In tokens, the end of each is rounded up to a whole step."""
        if unit == "steps":
            return cls(final, row_tokens, tuple(warmup))
        stages: list[tuple[int, int]] = []
        for (rows, _), end in zip(warmup, itertools.accumulate(length for _, length in warmup), strict=True):
            so_far = sum(steps for _, steps in stages)
            stages.append((rows, cls(rows, row_tokens, tuple(stages)).steps(end) - so_far))
        return cls(final, row_tokens, tuple(stages))

    @property
    def warmup_steps(self) -> int:
        return sum(steps for _, steps in self.warmup)

    def size(self, step: int) -> int:
        """Rows of update `step`."""
        return self.rows(step) - self.rows(step - 1)

    def rows(self, step: int) -> int:
        """Rows of the first `step` updates together."""
        rows, left = 0, step
        for size, steps in self.warmup:
            here = min(left, steps)
            rows, left = rows + here * size, left - here
        return rows + left * self.final

    def tokens(self, step: int) -> int:
        """Tokens of the first `step` updates together."""
        return self.rows(step) * self.row_tokens

    def steps(self, tokens: int) -> int:
        """How many updates it takes to consume so many tokens."""
        rows, before = -(-tokens // self.row_tokens), 0
        for size, steps in self.warmup:
            if rows <= steps * size:
                return before - (-rows // size)
            rows, before = rows - steps * size, before + steps
        return before - (-rows // self.final)

    def used(self, after: int, last: int) -> list[int]:
        """The sizes of the updates that follow update `after`, up to update `last`, each once, in order."""
        ends = [*itertools.accumulate(steps for _, steps in self.warmup), last]
        here = [min(max(end, after), last) for end in ends]
        starts = [after, *here[:-1]]
        sizes = [*(rows for rows, _ in self.warmup), self.final]
        return list(dict.fromkeys(size for size, a, b in zip(sizes, starts, here, strict=True) if a < b))
