"""Documents of any corpus, in a fixed order; which of them are held out; a key that stands for all of them.

Each kind of source is a file of its own: `python_sources`, `text_files`, ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from cpmjax.data.array_records import array_records
from cpmjax.data.chat_files import chat_files
from cpmjax.data.documents import Bad, Document
from cpmjax.data.files import below, is_url, versions
from cpmjax.data.huggingface_datasets import dataset_rows, dataset_version
from cpmjax.data.parquet_files import PARQUET, parquet_files
from cpmjax.data.python_sources import language_reference, standard_library
from cpmjax.data.text_files import JSONL, jsonl_files, text_files
from cpmjax.run.errors import UserError
from cpmjax.run.sources import (
    ArrayRecords,
    Chat,
    CorpusConfig,
    HuggingFaceDataset,
    Jsonl,
    LanguageReference,
    Parquet,
    StandardLibrary,
    TextFolder,
)

OnBad = Literal["refuse", "skip"]


def documents(
    corpus: CorpusConfig, on_bad: OnBad = "refuse", skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of a corpus, in the order of their file names (and lines, rows or records).

    A bad document raises UserError naming file, line and expectation; with `on_bad="skip"` it is left out and
    counted in `skipped` by reason. Always refused: a path that is missing or holds no document at all, a file that
    changes while it is read, a store that does not answer, and a format whose package is not installed.
    """
    found = False
    for item in _items(corpus):
        if isinstance(item, Document):
            found = True
            yield item
        elif on_bad == "refuse":
            raise UserError(item.message)
        elif skipped is not None:
            skipped[item.reason] += 1
    if not found:
        raise UserError(f"{corpus}: not one usable document; expected text to train on")


def placed(corpus: CorpusConfig, folder: str) -> CorpusConfig:
    """The corpus with its path from `folder` on, if it has a relative one."""
    path = getattr(corpus, "path", None)
    return corpus if path is None else dataclasses.replace(corpus, path=below(folder, path))  # type: ignore[call-arg]


def held_out(name: str, share: float) -> bool:
    """Whether a document is kept out of training: a hash of its name alone, so no other document can change it."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Reading:
    """An iterator of a corpus's documents that knows, at its end, the key of what was read."""

    def __init__(self, corpus: CorpusConfig, on_bad: OnBad = "refuse") -> None:
        self.skipped: Counter[str] = Counter()  # by reason
        self._corpus, self._on_bad = corpus, on_bad
        self._digest = hashlib.sha256(repr(corpus).encode())

    def __iter__(self) -> Iterator[Document]:
        for document in documents(self._corpus, self._on_bad, self.skipped):
            for part in (os.fsencode(document.name), document.text.encode()):
                self._digest.update(len(part).to_bytes(8, "little"))
                self._digest.update(part)
            yield document

    def text(self) -> str:
        """Stands for all documents so far."""
        return self._digest.hexdigest()

    def key(self) -> str:
        """What `content_key` says of a corpus in which these are the documents, at this moment."""
        version = _version(self._corpus)
        if version is not None:
            return hashlib.sha256(repr((self._corpus, self._on_bad, version)).encode()).hexdigest()
        digest = self._digest.copy()
        digest.update(repr(sorted(self.skipped.items())).encode())
        return digest.hexdigest()


def content_key(corpus: CorpusConfig, on_bad: OnBad = "refuse") -> str:
    """64 hexadecimal digits that change with any document, its name, a skipped document or a setting.

    They are those of the text itself, which is read for them, except where a store tells the version of each of its
    files (`cpmjax.data.files`) and nothing has to be fetched.
    """
    reading = Reading(corpus, on_bad)
    if _version(corpus) is None:
        for _ in reading:
            pass
    return reading.key()


def check_unchanged(name: str, before: str, after: str) -> None:
    """Raises UserError if the keys of a corpus before and after it was read differ; `name` is the experiment's."""
    if before != after:
        raise UserError(f"corpus {name}: changed while it was read; expected files that nobody writes to")


def _items(corpus: CorpusConfig) -> Iterator[Document | Bad]:
    match corpus:
        case StandardLibrary():
            return standard_library()
        case LanguageReference():
            return language_reference()
        case TextFolder(path, glob):
            return text_files(path, glob)
        case Jsonl(path, field):
            return jsonl_files(path, field)
        case Chat(path, field):
            return chat_files(path, field)
        case Parquet(path, field):
            return parquet_files(path, field)
        case ArrayRecords(path, field):
            return array_records(path, field)
        case HuggingFaceDataset():
            return dataset_rows(corpus)
        case _:
            raise TypeError(f"no source for {type(corpus).__name__}")


def _version(corpus: CorpusConfig) -> str | None:
    """What stands for the content without reading it; None if only the text itself does."""
    match corpus:
        case TextFolder(path, glob) if is_url(path):
            return versions(path, [glob])
        case Jsonl(path, _) | Chat(path, _) if is_url(path):
            return versions(path, JSONL)
        case Parquet(path, _) if is_url(path):
            return versions(path, PARQUET)
        case HuggingFaceDataset(name, config):
            return dataset_version(name, config)
        case _:
            return None
