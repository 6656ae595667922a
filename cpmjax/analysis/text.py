"""Text to study a series on: packed rows of a corpus, held out or trained on.

B rows, L tokens a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from cpmjax.checkpoint.series import Series
from cpmjax.data.batches import Batch, Rows
from cpmjax.data.corpora import placed
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.data.tokens import build_or_open
from cpmjax.run import cli
from cpmjax.run.errors import UserError

_HELD_OUT = 0.04  # of documents, by a hash of their names, where a series says nothing: an import has no corpora


def text_rows(
    series: Series,
    corpus: dict[str, Any] | str,
    rows: int,
    length: int | None = None,
    split: Literal["held_out", "train"] = "held_out",
) -> Batch:
    """`rows` packed rows of a corpus, evenly spread over its documents: a dict of [B, L] arrays (see `Rows.row`).

    `corpus` is the name of one of the series' own corpora, or what an experiment would say of it, as in {"type":
    "standard_library"}; its held-out documents are those that a run with this share of them does not train on. `length`
    is that of the run's own rows, 256 of an import, unless given. Raises UserError for a corpus that nobody knows, and
    if the split has fewer rows.
    """
    config, data = series.config, series.config.data
    if isinstance(corpus, str):
        if corpus not in data.corpora:
            known = ", ".join(data.corpora) or "none: name one as in {'type': 'standard_library'}"
            raise UserError(f"{series.path}: has no corpus {corpus}; expected one of {known}")
        name, source = corpus, placed(data.corpora[corpus], data.folder)
    else:
        name = str(corpus.get("type", "text"))
        tree = {"data": {"corpora": {name: corpus}, "stable": {name: 1.0}}}
        source = cli.decode(tree, "the corpus of a study").data.corpora[name]
    store = build_or_open(
        name,
        source,
        tokenizer_of(series),
        held_out=data.held_out if data.corpora else _HELD_OUT,
        on_bad=data.bad_documents,
        cache=Path(config.run.cache),
        progress=lambda _: None,
    )
    found = Rows(getattr(store, split), length or (data.sequence_length if data.corpora else 256), None)
    full = found.rows - 1  # the last one is filled up with padding
    if full < rows:
        raise UserError(f"corpus {name}: {full} full rows of {found.length} tokens {split}; expected at least {rows}")
    picked = [found.row(int(index)) for index in np.linspace(0, full - 1, rows).round()]
    return {key: np.stack([row[key] for row in picked]) for key in picked[0]}


def tokenizer_of(series: Series) -> Tokenizer:
    """Raises UserError if the series has none."""
    return Tokenizer.load(series.path)


def nats_to_bits_per_byte(series: Series, batch: Batch) -> float:
    """What a loss in nats per token of this batch is multiplied by: it no longer depends on the tokenizer."""
    lengths = np.asarray(tokenizer_of(series).byte_lengths(), np.float64)
    weights = np.asarray(batch["weights"], np.float64)
    return float(weights.sum() / (np.log(2) * (weights * lengths[batch["targets"]]).sum()))
