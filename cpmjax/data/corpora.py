"""Sources of documents, in a fixed order: the standard library, the language reference, text files, jsonl."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import importlib.util
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from cpmjax.run.config import CorpusConfig, Jsonl, LanguageReference, StandardLibrary, TextFolder
from cpmjax.run.errors import UserError

OnBad = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Document:
    """One text, and a name for it that is unique in its corpus and the same on every machine."""

    name: str
    text: str


@dataclass(frozen=True)
class _Bad:
    """What stands where a document should: a reason to count it by, and one line for whoever can mend it."""

    reason: str
    message: str


def documents(
    corpus: CorpusConfig, on_bad: OnBad = "refuse", skipped: Counter[str] | None = None
) -> Iterator[Document]:
    """The documents of a corpus, in the order of their file names (and lines).

    A bad document raises UserError naming file, line and expectation; with `on_bad="skip"` it is left out and
    counted in `skipped` by reason. A path that is missing, or holds no document at all, is always refused.
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


def held_out(name: str, share: float) -> bool:
    """Whether a document is kept out of training: a hash of its name alone, so no other document can change it."""
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def content_key(corpus: CorpusConfig, on_bad: OnBad = "refuse") -> str:
    """64 hexadecimal digits that change with any document, its name, a skipped document or a setting."""
    skipped: Counter[str] = Counter()
    digest = hashlib.sha256(repr(corpus).encode())
    for document in documents(corpus, on_bad, skipped):
        for part in (os.fsencode(document.name), document.text.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    digest.update(repr(sorted(skipped.items())).encode())
    return digest.hexdigest()


def _items(corpus: CorpusConfig) -> Iterator[Document | _Bad]:
    match corpus:
        case StandardLibrary():
            return _standard_library()
        case LanguageReference():
            return _language_reference()
        case TextFolder(path, glob):
            return _text_files(Path(path).expanduser(), glob)
        case Jsonl(path, field):
            return _jsonl_files(Path(path).expanduser(), field)
        case _:
            raise TypeError(f"no source for {type(corpus).__name__}")


# Tests, installed packages and extension modules are not the library's source. `encodings` (1.4 MB of 12) is nearly
# all generated tables from bytes to characters; html/entities.py is a table too, and topics.py is a corpus of its own.
_FOLDERS_LEFT_OUT = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings"]
)
_FILES_LEFT_OUT = frozenset(["html/entities.py", "pydoc_data/topics.py"])


def _standard_library() -> Iterator[Document | _Bad]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in _files(root, _FOLDERS_LEFT_OUT):
        # _sysconfigdata_*.py holds the compiler flags and paths of this one machine.
        if not name.endswith(".py") or name in _FILES_LEFT_OUT or name.startswith("_sysconfigdata"):
            continue
        raw = _read(root / name)
        if isinstance(raw, _Bad):
            yield raw
            continue
        try:
            text = importlib.util.decode_source(raw)
        except (SyntaxError, UnicodeDecodeError) as error:
            yield _Bad("undecodable", f"{root / name}: {error}; expected source in the encoding it declares")
            continue
        # A package's empty __init__.py is no document, and no fault either.
        if text.strip():
            yield Document(name, text)


def _language_reference() -> Iterator[Document | _Bad]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("pydoc_data/topics.py: not part of this Python; expected the language reference") from error
    for topic in sorted(topics):
        yield _document(f"topics/{topic}", topics[topic], f"pydoc_data/topics.py, topic {topic}")


def _text_files(path: Path, glob: str) -> Iterator[Document | _Bad]:
    for root, name in _matching(path, [glob]):
        raw = _read(root / name)
        text = raw if isinstance(raw, _Bad) else _decode(raw, str(root / name))
        yield text if isinstance(text, _Bad) else _document(name, text, str(root / name))


def _jsonl_files(path: Path, field: str) -> Iterator[Document | _Bad]:
    for root, name in _matching(path, ["*.jsonl", "*.jsonl.gz"]):
        file, line, offset = root / name, 0, 0
        try:
            with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
                for line, raw in enumerate(stream, 1):
                    yield _record(f"{name}:{line}", f"{file}, line {line}", raw, offset, field)
                    offset += len(raw)
        except EOFError:
            yield _Bad("truncated gzip", f"{file}, line {line + 1}: the gzip data stops; expected a complete file")
        except (OSError, zlib.error) as error:
            yield _unreadable(f"{file}, line {line + 1}", error)
        else:
            if line == 0:
                yield _document(name, "", str(file))


def _record(name: str, place: str, raw: bytes, offset: int, field: str) -> Document | _Bad:
    """One line of a jsonl file; `offset` is where it begins in the (uncompressed) file."""
    line = _decode(raw, place, offset)
    if isinstance(line, _Bad):
        return line
    expected = f"expected an object whose {field!r} is a string"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Bad("malformed JSON", f"{place}: not JSON ({getattr(error, 'msg', error)}); {expected}")
    if not isinstance(record, dict):
        return _Bad("not an object", f"{place}: a JSON {type(record).__name__}; {expected}")
    if field not in record:
        nearest = difflib.get_close_matches(field, record, n=1, cutoff=0)
        hint = f"the nearest key is {nearest[0]!r}" if nearest else "it has no key at all"
        return _Bad("missing field", f"{place}: no {field!r}, {hint}; {expected}")
    text = record[field]
    if not isinstance(text, str):
        return _Bad("field not a string", f"{place}: its {field!r} is a {type(text).__name__}; {expected}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return _Bad("not Unicode", f"{place}: lone surrogate at character {error.start}; expected Unicode text")
    return _document(name, text, place)


def _document(name: str, text: str, place: str) -> Document | _Bad:
    return Document(name, text) if text.strip() else _Bad("empty", f"{place}: empty; expected text")


def _decode(raw: bytes, place: str, offset: int = 0) -> str | _Bad:
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        return _Bad("not UTF-8", f"{place}, byte {byte}: 0x{raw[error.start]:02x} is not UTF-8; expected UTF-8 text")


def _read(file: Path) -> bytes | _Bad:
    try:
        return file.read_bytes()
    except OSError as error:
        return _unreadable(str(file), error)


def _unreadable(place: str, error: Exception) -> _Bad:
    return _Bad("unreadable", f"{place}: {getattr(error, 'strerror', None) or error}; expected a readable file")


def _matching(path: Path, globs: list[str]) -> Iterator[tuple[Path, str]]:
    """(folder, name in it) of the file at `path` whatever its name, or of every file below it that matches."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder; expected the documents of a corpus there")
    if not path.is_dir():
        yield path.parent, path.name
        return
    # PurePath.match compares from the right, so that "**/" in front adds nothing.
    patterns = [glob.removeprefix("**/") for glob in globs]
    names = [name for name in _files(path) if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
    if not names:
        raise UserError(f"{path}: no file matches {' or '.join(globs)}; expected the documents of a corpus there")
    for name in names:
        yield path, name


def _files(root: Path, left_out: Collection[str] = ()) -> list[str]:
    """Names of all files below a folder, relative to it with "/", sorted; folders of some names are left out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}; expected a readable folder") from error

    names = []
    for folder, subfolders, files in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        inside = Path(folder).relative_to(root)
        names += [(inside / file).as_posix() for file in files]
    return sorted(names)
