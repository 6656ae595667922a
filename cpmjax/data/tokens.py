"""Tokenised corpora on disk: built once, keyed by content and tokenizer, memory-mapped ever after.

    <cache>/tokens/<corpus>-<key>/
      store.json            documents, tokens and UTF-8 bytes of each split; documents skipped, by reason
      train.tokens          raw little-endian ids: uint16 if the vocabulary fits, else uint32
      train.offsets.npy     int64 [documents + 1]: where each document begins; the last one is the number of tokens
      held_out.tokens, held_out.offsets.npy

A document is its ids between begin and end of text.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.data.corpora import OnBad, Reading, check_unchanged, content_key
from cpmjax.data.corpora import held_out as is_held_out
from cpmjax.data.documents import Document
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.errors import UserError
from cpmjax.run.sources import CorpusConfig

_FORMAT = 1  # part of the key: a change of layout builds anew
_SPLITS = ("train", "held_out")
_CHUNK_CHARACTERS = 4_000_000  # text that is in memory at one time


@dataclass(frozen=True)
class Split:
    """One split of a corpus, memory-mapped: documents lie one after the other."""

    name: str  # for messages, "code (train)"
    tokens: np.ndarray  # uint16 or uint32 [tokens]
    offsets: np.ndarray  # int64 [documents + 1]


@dataclass(frozen=True)
class Store:
    """A tokenised corpus. `summary` is its store.json; `key` stands for its text and its tokenizer."""

    key: str
    train: Split
    held_out: Split
    summary: dict[str, Any]


def build_or_open(
    name: str,
    corpus: CorpusConfig,
    tokenizer: Tokenizer,
    *,
    held_out: float,
    on_bad: OnBad,
    cache: Path,
    progress: Callable[[str], None],
) -> Store:
    """Opens the store of a corpus below `cache`, building it first if it is absent or damaged.

    `progress` is called with a line for each few megabytes of text. A store is renamed into place when it is
    complete; of several processes one builds and the others wait. Raises UserError for bad documents (unless
    `on_bad` is "skip"), for a corpus that is another one when its last document has been read than when the building
    began, and where the cache cannot be written.
    """
    content = content_key(corpus, on_bad)
    parts = (_FORMAT, content, tokenizer.fingerprint, held_out)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    folder = cache.expanduser() / "tokens" / f"{name}-{key}"
    store = _open(folder, name)
    if store is None:
        try:
            with _only_builder(folder.parent, lambda: progress(f"{name}: waiting for another process to tokenise")):
                store = _open(folder, name)
                if store is None:
                    _build(folder, name, corpus, content, tokenizer, held_out, on_bad, progress)
                    store = _open(folder, name)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; expected room for tokens there (run.cache)") from error
    assert store is not None
    return store


@contextmanager
def _only_builder(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the cache's lock, which the kernel frees when a process dies, and removes what dead builders left."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob("*.building"):
            shutil.rmtree(leftover)
        yield


def _build(
    folder: Path,
    name: str,
    corpus: CorpusConfig,
    content: str,
    tokenizer: Tokenizer,
    held_out: float,
    on_bad: OnBad,
    progress: Callable[[str], None],
) -> None:
    building = folder.with_name(folder.name + ".building")
    building.mkdir()
    reading = Reading(corpus, on_bad)
    try:
        with ExitStack() as stack:
            dtype = _dtype(tokenizer.vocabulary)
            writers = [stack.enter_context(_SplitWriter(building, split, dtype)) for split in _SPLITS]
            for chunk in _chunks(reading):
                rows = tokenizer.encode_documents([document.text for document in chunk])
                for document, row in zip(chunk, rows, strict=True):
                    writers[is_held_out(document.name, held_out)].append(document, row)
                done, tokens = (sum(writer.summary[unit] for writer in writers) for unit in ("documents", "tokens"))
                progress(f"{name}: {done:,} documents, {tokens:,} tokens")
        check_unchanged(name, content, reading.key())
        summary = {
            "corpus": repr(corpus),
            "dtype": dtype,
            "skipped": dict(sorted(reading.skipped.items())),
            **{writer.split: writer.summary for writer in writers},
        }
        (building / "store.json").write_text(json.dumps(summary, indent=2) + "\n")
        if folder.exists():  # damaged, or it would have been opened
            shutil.rmtree(folder)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


class _SplitWriter:
    """Writes the two files of a split as documents come."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.split = split
        self.summary = {"documents": 0, "tokens": 0, "bytes": 0}
        self._folder = folder
        self._dtype = dtype
        self._offsets = array("q", [0])

    def __enter__(self) -> _SplitWriter:
        self._file = open(self._folder / f"{self.split}.tokens", "wb")
        return self

    def append(self, document: Document, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self._dtype).tobytes())
        self.summary["documents"] += 1
        self.summary["tokens"] += len(ids)
        self.summary["bytes"] += len(document.text.encode())
        self._offsets.append(self.summary["tokens"])

    def __exit__(self, *_: object) -> None:
        # The rename must not reach the disk before the data does.
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        np.save(self._folder / f"{self.split}.offsets.npy", np.array(self._offsets, "<i8"))


def _chunks(source: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in source:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _open(folder: Path, name: str) -> Store | None:
    """None if there is no store, or its files are not what store.json says."""
    try:
        summary = json.loads((folder / "store.json").read_text())
        train, held_out = (_open_split(folder, name, split, summary) for split in _SPLITS)
    except (OSError, ValueError, KeyError):
        return None
    return Store(folder.name, train, held_out, summary)


def _open_split(folder: Path, name: str, split: str, summary: dict[str, Any]) -> Split:
    file, dtype, expected = folder / f"{split}.tokens", np.dtype(summary["dtype"]), summary[split]
    offsets = np.load(folder / f"{split}.offsets.npy", mmap_mode="r")
    size = expected["tokens"] * dtype.itemsize
    if file.stat().st_size != size or len(offsets) != expected["documents"] + 1 or offsets[-1] != expected["tokens"]:
        raise ValueError(f"{file}: not the size that store.json says")
    # An empty file cannot be mapped.
    tokens = np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)
    return Split(f"{name} ({split})", tokens, offsets)


def _dtype(vocabulary: int) -> str:
    return "<u2" if vocabulary <= 2**16 else "<u4"
