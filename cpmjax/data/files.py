"""The files of a corpus and their bytes: on this machine, or on any store that fsspec reads (gs://, s3://, ...).

A file is named relative to its corpus, so that its documents have the same names wherever the corpus lies. Files that
change while they are read, and stores that stop answering, end a job whatever it does with bad documents: what came
of them so far is not the corpus.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import urlsplit

from cpmjax.data.optional import optional
from cpmjax.run.errors import Unreachable, UserError

_BUFFER = 1 << 20  # bytes read of a store at one time

# What a store itself tells of an object's content: a checksum, else the number of its version, else when it last
# changed; the first one that is there is trusted, together with the size. What is not noticed is a store that keeps
# all of these for other content of the same size (a time of change that was set back, say).
_CHECKSUMS = ("md5Hash", "crc32c", "checksum", "Content-MD5", "Digest", "blob_id", "ETag", "etag", "generation")
_TIMES = ("LastModified", "Last-Modified", "last_modified", "updated", "modified", "mtime")


class File(Protocol):
    """A file of a corpus."""

    @property
    def name(self) -> str:
        """Relative to the folder of the corpus, with "/"."""

    @property
    def place(self) -> str:
        """Its whole path or URL, for messages."""

    def open(self) -> BinaryIO: ...

    def state(self) -> tuple[Any, ...]:
        """What differs once the file is another one."""


@dataclass(frozen=True)
class LocalFile:
    name: str
    path: Path

    @property
    def place(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def state(self) -> tuple[Any, ...]:
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino


@dataclass(frozen=True)
class StoredFile:
    """`path` is how the store's fsspec file system, `system`, calls it."""

    name: str
    place: str
    system: Any
    path: str

    def open(self) -> BinaryIO:
        with _answering(self.place):
            file = self.system.open(self.path, "rb")
        return cast(BinaryIO, io.BufferedReader(_Stream(file, self.place), _BUFFER))

    def version(self) -> str | None:
        """Stands for the content, as far as the store's word is good; None if it says nothing of it."""
        with _answering(self.place):
            info = self.system.info(self.path)
        for key in (*_CHECKSUMS, *_TIMES):
            if info.get(key):
                return f"{info.get('size')} {key} {info[key]}"
        return None

    def state(self) -> tuple[Any, ...]:
        with _answering(self.place):
            self.system.invalidate_cache()  # a listing that fsspec remembers would hide the change
            return self.system.info(self.path).get("size"), self.version()


class _Stream(io.RawIOBase):
    """The bytes of a stored file; a store that fails raises Unreachable."""

    def __init__(self, file: Any, place: str) -> None:
        self._file = file
        self._place = place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer: Any) -> int:
        with _answering(self._place):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _answering(self._place):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _answering(place: str) -> Iterator[None]:
    """Each store's library has errors of its own; all of them mean that the corpus cannot be had."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Unreachable(f"{place}: {said}; expected a store that answers") from error


@contextmanager
def reading(file: File) -> Iterator[BinaryIO]:
    """The bytes of a file. Raises UserError if it has become another one by the end; OSError if it cannot be read."""
    before = file.state()
    with file.open() as stream:
        try:
            yield stream
        except Exception:  # data that stop short may be those of a file that somebody still writes
            _check_unchanged(file, before)
            raise
    _check_unchanged(file, before)


def _check_unchanged(file: File, before: tuple[Any, ...]) -> None:
    try:
        unchanged = file.state() == before
    except OSError:
        unchanged = False
    if not unchanged:
        raise UserError(f"{file.place}: changed while it was read; expected a file that nobody writes to")


def is_url(path: str) -> bool:
    return "://" in path


def below(folder: str, path: str) -> str:
    """A relative path from a folder or URL on; any other one, and any where `folder` is "", stays as it is."""
    if not folder or is_url(path) or path.startswith(("/", "~")):
        return path
    return f"{folder.rstrip('/')}/{path}"


def matching(path: str, globs: Sequence[str]) -> Sequence[File]:
    """The file at `path` whatever its name, or every file below it that matches, in the order of their names.

    Raises UserError if there is none, and for a URL whose store does not answer or needs a package.
    """
    return _stored(path, globs) if is_url(path) else _local(Path(path).expanduser(), globs)


def _local(path: Path, globs: Sequence[str]) -> list[LocalFile]:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder; expected the documents of a corpus there")
    if not path.is_dir():
        return [LocalFile(path.name, path)]
    return [LocalFile(name, path / name) for name in _matching(str(path), names_below(path), globs)]


def _stored(url: str, globs: Sequence[str]) -> list[StoredFile]:
    core = optional("fsspec.core", url)
    with _answering(url):
        try:
            system, root = core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # "Install gcsfs to access Google Storage"
            raise UserError(f"{url}: {error}; expected a store that fsspec reads") from error
        # Without a handler of its own a library's log, gcsfs's with its tracebacks, would go to the terminal.
        logging.getLogger(type(system).__module__.partition(".")[0]).addHandler(logging.NullHandler())
        system.invalidate_cache()
        try:
            kind = system.info(root)["type"]
        except FileNotFoundError as error:
            if isinstance(error.__cause__, OSError):  # fsspec says so too of an HTTP server that does not answer
                raise error.__cause__ from None
            raise UserError(f"{url}: no such file or folder; expected the documents of a corpus there") from error
        if kind == "file" and not url.endswith("/"):  # to HTTP a folder is a file too
            # A query, "?download=true" or a signature, says nothing of the document, and would hide a .gz before it.
            path = urlsplit(root).path if root.startswith(("http://", "https://")) else root
            return [StoredFile(PurePosixPath(path).name, url, system, root)]
        below = root.rstrip("/") + "/"
        paths = {found.removeprefix(below).removeprefix("/"): found for found in system.find(root)}
    names = _matching(url, sorted(paths), globs)
    return [StoredFile(name, system.unstrip_protocol(paths[name]), system, paths[name]) for name in names]


def _matching(place: str, names: Sequence[str], globs: Sequence[str]) -> list[str]:
    # PurePath.match compares from the right, so that "**/" in front adds nothing.
    patterns = [glob.removeprefix("**/") for glob in globs]
    found = [name for name in names if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
    if not found:
        raise UserError(f"{place}: no file matches {' or '.join(globs)}; expected the documents of a corpus there")
    return found


def names_below(root: Path, left_out: Collection[str] = ()) -> list[str]:
    """Names of all files below a folder, relative to it with "/", sorted; folders of some names are left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; expected a readable folder") from error

    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        inside = Path(folder).relative_to(root)
        names += [(inside / file).as_posix() for file in files]
    return sorted(names)


def versions(path: str, globs: Sequence[str]) -> str | None:
    """Stands for the content of all files at a URL, by the word of their store; None if that says nothing of one."""
    lines = []
    for file in _stored(path, globs):
        version = file.version()
        if version is None:
            return None
        lines.append(f"{file.name} {version}\n")
    return "".join(lines)
