"""A few of the steps of a series, a few rows of its text at a time, and the rows that a run has read.

B rows, L tokens a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cpmjax.analysis.text import tokenizer_of
from cpmjax.checkpoint.series import Series
from cpmjax.data.batches import Batch
from cpmjax.data.text import Text, make_mixture, open_stores, segments
from cpmjax.run.errors import UserError


def spread(steps: Sequence[int], number: int) -> list[int]:
    """At most `number` of some steps, evenly spread, the first and the last among them."""
    return [steps[int(i)] for i in np.unique(np.linspace(0, len(steps) - 1, min(number, len(steps))).round())]


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch of arrays [B, ...] in batches of at most `rows` rows, in order."""
    for start in range(0, len(batch["tokens"]), rows):
        yield {key: values[start : start + rows] for key, values in batch.items()}


def rows_read(series: Series, rows: int, last: int) -> Batch:
    """`rows` rows that the trunk of a series has trained on up to the step `last`, evenly spread over its steps.

    For a trunk from scratch, whose text is where it was. Raises UserError for an import, whose text nobody knows,
    and if fewer rows were read.
    """
    while series.parent is not None:
        last, series = min(last, series.branch_step), series.parent
    config = series.config
    if not config.data.corpora:
        raise UserError(f"{series.path}: has no corpora; expected a run that was trained here")
    read = config.batches.rows(last)
    if read < rows:
        raise UserError(f"{series.path}: {read} rows were read up to step {last}; expected at least {rows}")
    schedule = config.schedule.in_steps(config.batches)
    stores = open_stores(config, tokenizer_of(series), lambda _: None)
    order = segments(schedule, config.data, config.batches)
    text = Text(config, stores, make_mixture(config, stores, order, config.batches.rows(schedule.total)))
    picked = [text.batches(int(position), 1) for position in np.linspace(0, read - 1, rows).round()]
    return {key: np.concatenate([row[key] for row in picked]) for key in picked[0]}
