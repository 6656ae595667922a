"""A document, or why there is none: what every source of text yields, and how bytes and records become it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Document:
    """One text, and a name for it that is unique in its corpus and the same on every machine and store."""

    name: str
    text: str


@dataclass(frozen=True)
class Bad:
    """What stands where a document should: a reason to count it by, and one line for whoever can mend it."""

    reason: str
    message: str


# In what follows `place` is where a message says that the text lies: file and line, say.


def document(name: str, text: str, place: str) -> Document | Bad:
    return Document(name, text) if text.strip() else Bad("empty", f"{place}: empty; expected text")


def from_bytes(name: str, raw: bytes, place: str) -> Document | Bad:
    text = decode(raw, place)
    return text if isinstance(text, Bad) else document(name, text, place)


def from_json(name: str, raw: bytes, place: str, field: str, offset: int = 0) -> Document | Bad:
    """The document in one field of a JSON object; `offset` is where `raw` begins in what a message counts bytes of."""
    record = json_object(raw, place, f"expected an object whose {field!r} is a string", offset)
    return record if isinstance(record, Bad) else from_record(name, record, place, field)


def json_object(raw: bytes, place: str, expected: str, offset: int = 0) -> dict[str, Any] | Bad:
    line = decode(raw, place, offset)
    if isinstance(line, Bad):
        return line
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad("malformed JSON", f"{place}: not JSON ({getattr(error, 'msg', error)}); {expected}")
    if not isinstance(record, dict):
        return Bad("not an object", f"{place}: a JSON {type(record).__name__}; {expected}")
    return record


def from_record(name: str, record: Mapping[str, Any], place: str, field: str) -> Document | Bad:
    """The document in one field of a mapping."""
    if field not in record:
        return missing(place, field, list(record))
    text = record[field]
    if not isinstance(text, str):
        message = f"{place}: its {field!r} is a {type(text).__name__}; expected an object whose {field!r} is a string"
        return Bad("field not a string", message)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        return Bad("not Unicode", f"{place}: lone surrogate at character {error.start}; expected Unicode text")
    return document(name, text, place)


def missing(place: str, field: str, there: list[str], kind: str = "string") -> Bad:
    """There is no such field among those of a record or a table."""
    nearest = difflib.get_close_matches(field, there, n=1, cutoff=0)
    hint = f"the nearest key is {nearest[0]!r}" if nearest else "it has no key at all"
    return Bad("missing field", f"{place}: no {field!r}, {hint}; expected an object whose {field!r} is a {kind}")


def decode(raw: bytes, place: str, offset: int = 0) -> str | Bad:
    """UTF-8, with or without its mark at the beginning."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = offset + error.start
        return Bad("not UTF-8", f"{place}, byte {byte}: 0x{raw[error.start]:02x} is not UTF-8; expected UTF-8 text")


def unreadable(place: str, error: Exception) -> Bad:
    return Bad("unreadable", f"{place}: {getattr(error, 'strerror', None) or error}; expected a readable file")
