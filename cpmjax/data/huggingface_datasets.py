"""Hugging Face datasets, downloaded or streamed: a document a row.

The package runs no code of a dataset from its version 4 on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cpmjax.data.documents import Bad, Document, from_record, missing
from cpmjax.data.optional import optional
from cpmjax.run.errors import Unreachable
from cpmjax.run.sources import HuggingFaceDataset


def dataset_rows(corpus: HuggingFaceDataset) -> Iterator[Document | Bad]:
    """Each row, named SPLIT:ROW (the first is 1), whether it is streamed or not."""
    datasets = optional("datasets", corpus.name)
    place = f"{corpus.name}, {corpus.split}"
    # A folder has nothing to download, and the package would go on with the copy in its cache when a file of a folder
    # with named configurations has changed (datasets 5.2).
    streaming = corpus.streaming or os.path.isdir(corpus.name)
    with _loading(place):
        rows = datasets.load_dataset(corpus.name, corpus.config, split=corpus.split, streaming=streaming)
        columns = rows.column_names  # None where a stream has not said yet
        if columns is not None:
            if corpus.field not in columns:
                yield missing(place, corpus.field, columns)
                return
            rows = rows.select_columns([corpus.field])  # so that images beside the text, say, are not decoded
        for number, row in enumerate(rows, 1):
            yield from_record(f"{corpus.split}:{number}", row, f"{place}, row {number}", corpus.field)


def dataset_version(name: str, config: str | None) -> str | None:
    """Stands for the data files as they are, by what `datasets` knows of where each is from: the commit of the hub's
    repository, or when a local file was last changed. None if it knows neither.
    """
    datasets = optional("datasets", name)
    with _loading(name):
        files = datasets.load_dataset_builder(name, config).config.data_files or {}
        lines = []
        for split, paths in sorted(files.items()):
            for path, origin in zip(paths, paths.origin_metadata, strict=True):
                if not origin:
                    return None
                lines.append(f"{split} {path} {origin}\n")
        return "".join(lines) or None


@contextmanager
def _loading(place: str) -> Iterator[None]:
    """An error of the package means that more rows are missing than one."""
    try:
        yield
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Unreachable(f"{place}: {said}; expected what datasets.load_dataset can read") from error
