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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.data.corpora import OnBad, Reading, check_unchanged, content_key
from cpmjax.data.corpora import held_out as is_held_out
from cpmjax.data.documents import Document
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.data.unfinished import SPLITS, Rows, Unfinished
from cpmjax.run.errors import Unreachable, UserError
from cpmjax.run.sources import CorpusConfig

_FORMAT = 1  # part of the key: a change of layout builds anew
_PART_CHARACTERS = 2_000_000  # text that one core encodes at one time
_KEPT_SECONDS = 7 * 24 * 3600  # for which a build that was interrupted can go on


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
    begun: str | None = None,
) -> Store:
    """Opens the store of a corpus below `cache`, building it first if it is absent or damaged.

    `progress` is called with a line for each few megabytes of text. A store is renamed into place when it is
    complete, and is the same whatever the number of cores; of several processes one builds and the others wait. A
    build that was killed goes on after the parts that are whole and whose documents are still the same (see
    `cpmjax.data.unfinished`). `begun` is the key of the store that a run began with: where the corpus does not answer
    any more, and that store is whole, it is opened. Raises Unreachable for a corpus that does not answer otherwise,
    and UserError for bad documents (unless `on_bad` is "skip"), for a corpus that is another one when its last document
    has been read than when the building began, and where the cache cannot be written.
    """
    try:
        content = content_key(corpus, on_bad)
    except Unreachable as error:
        store = None if begun is None else _open(cache.expanduser() / "tokens" / begun, name)
        if store is None:
            raise
        progress(f"corpus {name}: {error}; going on with the tokens that the run began with")
        return store
    parts = (_FORMAT, content, tokenizer.fingerprint, held_out)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    folder = cache.expanduser() / "tokens" / f"{name}-{key}"
    building = folder.with_name(folder.name + ".building")
    store = _open(folder, name)
    if store is None:
        try:
            with _only_builder(building, lambda: progress(f"{name}: waiting for another process to tokenise")):
                store = _open(folder, name)
                if store is None:
                    _build(folder, building, name, corpus, content, tokenizer, held_out, on_bad, progress)
                    store = _open(folder, name)
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; expected room for tokens there (run.cache)") from error
    assert store is not None
    shutil.rmtree(building, ignore_errors=True)  # also that of a builder which died right after the renaming
    return store


@contextmanager
def _only_builder(building: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds the cache's lock, which the kernel frees when a process dies, and removes what nobody went on with.

    That is what dead builders left, other than `building`, if nothing was written there for a week.
    """
    folder = building.parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in folder.glob("*.building"):
            with suppress(FileNotFoundError):  # whoever has its store removes it without the lock
                written = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
                if leftover != building and time.time() - written > _KEPT_SECONDS:
                    shutil.rmtree(leftover)
        yield


def _build(
    folder: Path,
    building: Path,
    name: str,
    corpus: CorpusConfig,
    content: str,
    tokenizer: Tokenizer,
    held_out: float,
    on_bad: OnBad,
    progress: Callable[[str], None],
) -> None:
    """A kill, Ctrl-C and a store that stops answering leave what there is in `building`; other errors leave nothing."""
    reading = Reading(corpus, on_bad)
    dtype = _dtype(tokenizer.vocabulary)

    def encode(chunk: list[Document]) -> dict[str, Rows]:
        split = [is_held_out(document.name, held_out) for document in chunk]
        return {
            name: _encode(
                [document.text for document, out in zip(chunk, split, strict=True) if out is kept], tokenizer, dtype
            )
            for name, kept in zip(SPLITS, (False, True), strict=True)
        }

    try:
        with Unfinished(building, dtype) as unfinished:
            if there := unfinished.total("documents"):
                progress(f"{name}: a build was interrupted; goes on from document {there + 1:,}")
            for text, rows in _encoded(reading, encode, unfinished.has):
                unfinished.append(text, rows)
                done, tokens = (unfinished.total(unit) for unit in ("documents", "tokens"))
                progress(f"{name}: {done:,} documents, {tokens:,} tokens")
            check_unchanged(name, content, reading.key())
            skipped = dict(sorted(reading.skipped.items()))
            unfinished.finish({"corpus": repr(corpus), "dtype": dtype, "skipped": skipped})
        if folder.exists():  # damaged, or it would have been opened
            shutil.rmtree(folder)
        unfinished.store.rename(folder)
    except Unreachable:
        raise
    except Exception:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _encoded(
    reading: Reading, encode: Callable[[list[Document]], dict[str, Rows]], is_there: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, Rows]]]:
    """The parts of a corpus that are not there yet, in their order: what stands for its text so far, and the rows.

    Every core encodes one part while the next ones are read. With threads, as sentencepiece lets go of the interpreter;
    its own threads divide a list of documents beforehand, and all but one may wait for a long one.
    """
    cores = os.cpu_count() or 1
    pending: deque[tuple[str, Future[dict[str, Rows]]]] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for chunk in _chunks(reading):
            text = reading.text()
            if not is_there(text):
                pending.append((text, pool.submit(encode, chunk)))
            if len(pending) > 2 * cores:
                text, rows = pending.popleft()
                yield text, rows.result()
        for text, rows in pending:
            yield text, rows.result()


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Rows:
    rows = tokenizer.encode_documents(texts)
    return Rows(
        np.concatenate([np.empty(0, dtype), *rows], dtype=dtype, casting="unsafe"),
        np.array([len(row) for row in rows], np.int64),
        sum(len(text.encode()) for text in texts),
    )


def _chunks(source: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in source:
        chunk.append(document)
        size += len(document.text)
        if size >= _PART_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _open(folder: Path, name: str) -> Store | None:
    """None if there is no store, or its files are not what store.json says."""
    try:
        summary = json.loads((folder / "store.json").read_text())
        train, held_out = (_open_split(folder, name, split, summary) for split in SPLITS)
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
