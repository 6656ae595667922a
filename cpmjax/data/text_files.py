"""Text files and jsonl: a document a file, a document a line."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial

from cpmjax.data.compressed import FORMATS, decompressed
from cpmjax.data.documents import Bad, Document, document, from_bytes, from_json, unreadable
from cpmjax.data.files import matching, reading

JSONL = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst")


def text_files(path: str, glob: str) -> Iterator[Document | Bad]:
    """Each file, named as in its folder."""
    for file in matching(path, [glob]):
        try:
            with reading(file) as stream:
                raw = stream.read()
        except OSError as error:
            yield unreadable(file.place, error)
        else:
            yield from_bytes(file.name, raw, file.place)


def jsonl_files(path: str, field: str) -> Iterator[Document | Bad]:
    """The text in one field of each line."""
    return each_line(path, partial(from_json, field=field))


def each_line(path: str, read: Callable[..., Document | Bad]) -> Iterator[Document | Bad]:
    """What `read(name, raw, place, offset=...)` makes of each line of the .jsonl files, as `from_json` does.

    A line is named FILE:LINE. Of a file that is cut short the lines before the cut are there.
    """
    for file in matching(path, JSONL):
        line, offset = 0, 0  # in the unpacked file
        try:
            with reading(file) as stream, decompressed(stream, file.name) as lines:
                for line, raw in enumerate(lines, 1):
                    yield read(f"{file.name}:{line}", raw, f"{file.place}, line {line}", offset=offset)
                    offset += len(raw)
        except EOFError:
            kind = FORMATS[file.name[file.name.rindex(".") :]]
            message = f"{file.place}, line {line + 1}: the {kind} data stops; expected a complete file"
            yield Bad(f"truncated {kind}", message)
        except (OSError, zlib.error) as error:
            yield unreadable(f"{file.place}, line {line + 1}", error)
        else:
            if line == 0:
                yield document(file.name, "", file.place)
