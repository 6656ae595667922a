"""A store while it is built: what a builder leaves that is killed, so that the next one goes on from there.

    <folder>/
      parts.jsonl           a line a part: the text it ends with, bytes of each file so far, checksums; see `_Line`
      train.ends            raw little-endian int64: where each document ends, in tokens
      held_out.ends
      store/                what becomes the store: train.tokens, held_out.tokens, ...

A part counts if its line is whole and its bytes are those of the line, so that nothing has to reach the disk in order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.run.directory import write_atomically

SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class Rows:
    """Tokenised documents that follow each other in a split."""

    ids: np.ndarray  # in the data type of the store [tokens]
    lengths: np.ndarray  # int64 [documents]
    text_bytes: int  # UTF-8


@dataclass(frozen=True)
class _Line:
    """What parts.jsonl says of a part, after a checksum of this and a space."""

    text: str  # stands for every document of the corpus up to the last one of the part
    sizes: dict[str, int]  # bytes of each file, with those of all parts before
    text_bytes: dict[str, int]  # of each split, so too
    added: str  # checksum of the bytes that this part adds to the files


class Unfinished:
    """Takes the parts of a corpus in their order. Opening it finds those of an earlier builder, up to a damaged one."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.store = folder / "store"
        self.store.mkdir(parents=True, exist_ok=True)
        self._itemsize = np.dtype(dtype).itemsize
        paths = [self.store / f"{split}.tokens" for split in SPLITS] + [folder / f"{split}.ends" for split in SPLITS]
        with ExitStack() as stack:
            self._files = {path.name: stack.enter_context(open(path, "a+b")) for path in paths}
            self._lines = stack.enter_context(open(folder / "parts.jsonl", "a+b"))
            self._open = stack.pop_all()
        # The last part that is known to be of this corpus, and where its line ends; what was found after it.
        self._last, self._end = _Line("", dict.fromkeys(self._files, 0), dict.fromkeys(SPLITS, 0), ""), 0
        self._found = self._read()
        self._truncate()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def counts(self, split: str) -> dict[str, int]:
        """Documents, tokens and UTF-8 bytes of text, with those that an earlier builder left."""
        line = self._found[-1][0] if self._found else self._last
        return {
            "documents": line.sizes[f"{split}.ends"] // 8,
            "tokens": line.sizes[f"{split}.tokens"] // self._itemsize,
            "bytes": line.text_bytes[split],
        }

    def total(self, unit: str) -> int:
        return sum(self.counts(split)[unit] for split in SPLITS)

    def has(self, text: str) -> bool:
        """Whether the next part is there and ends with this text. If it is another one, all that was found is dropped.

        What a builder left may be of text that changed under it, and was changed back since.
        """
        if self._found and self._found[0][0].text == text:
            self._last, self._end = self._found.popleft()
            return True
        self._drop_found()
        return False

    def append(self, text: str, rows: dict[str, Rows]) -> None:
        """Adds the part that follows the last one which was there or was added."""
        self._drop_found()
        added: dict[str, bytes] = {}
        for split, new in rows.items():
            begin = self._last.sizes[f"{split}.tokens"] // self._itemsize
            added[f"{split}.tokens"] = new.ids.tobytes()
            added[f"{split}.ends"] = (begin + np.cumsum(new.lengths)).astype("<i8").tobytes()
        for name, file in self._files.items():
            file.write(added[name])
            file.flush()
        sizes = {name: size + len(added[name]) for name, size in self._last.sizes.items()}
        text_bytes = {split: size + rows[split].text_bytes for split, size in self._last.text_bytes.items()}
        self._last = _Line(text, sizes, text_bytes, _checksum(*(added[name] for name in self._files)))
        record = json.dumps(asdict(self._last)).encode()
        self._end += self._lines.write(_checksum(record).encode() + b" " + record + b"\n")
        self._lines.flush()

    def finish(self, about: dict[str, Any]) -> None:
        """Completes `store`, with all of it on the disk. store.json says what it is `about`, and the counts."""
        self._drop_found()
        for split in SPLITS:
            os.fsync(self._files[f"{split}.tokens"].fileno())
            ends = self._files[f"{split}.ends"]
            ends.seek(0)
            with open(self.store / f"{split}.offsets.npy", "wb") as file:
                np.save(file, np.frombuffer(bytes(8) + ends.read(), "<i8"))
                file.flush()
                os.fsync(file.fileno())
        summary = about | {split: self.counts(split) for split in SPLITS}
        write_atomically(self.store / "store.json", json.dumps(summary, indent=2) + "\n")

    def _read(self) -> deque[tuple[_Line, int]]:
        """The parts that are whole, each with the end of its line, up to the first one that is not."""
        found: deque[tuple[_Line, int]] = deque()
        for file in (*self._files.values(), self._lines):
            file.seek(0)
        before, end = self._last, self._end
        for raw in self._lines:
            checksum, _, record = raw.partition(b" ")
            if not raw.endswith(b"\n") or _checksum(record[:-1]).encode() != checksum:
                break
            line = _Line(**json.loads(record))
            added = [file.read(line.sizes[name] - before.sizes[name]) for name, file in self._files.items()]
            if _checksum(*added) != line.added:
                break
            before, end = line, end + len(raw)
            found.append((line, end))
        return found

    def _drop_found(self) -> None:
        if self._found:
            self._found.clear()
            self._truncate()

    def _truncate(self) -> None:
        """Ends every file where the last part does."""
        line, end = self._found[-1] if self._found else (self._last, self._end)
        for name, file in self._files.items():
            file.truncate(line.sizes[name])
        self._lines.truncate(end)


def _checksum(*data: bytes) -> str:
    digest = hashlib.sha256()
    for each in data:
        digest.update(each)
    return digest.hexdigest()
