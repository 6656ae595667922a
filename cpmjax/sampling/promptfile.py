"""Prompts from a file, samples to a file: what was asked, line by line, and an output that goes on after a kill."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cpmjax.run.directory import Lines, write_atomically
from cpmjax.run.errors import UserError

_FORMS = ("prompt", "messages", "ids")
Given = str | list[int] | list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One line of a file: text, token ids, or the messages of a conversation, and options of its own."""

    where: str  # "prompts.jsonl, line 3"
    given: Given
    options: dict[str, Any] = field(default_factory=dict)
    identity: Any = None  # its "id", handed on to its samples

    @property
    def is_conversation(self) -> bool:
        return bool(self.given) and isinstance(self.given[0], dict)


def read_prompts(path: Path | None, stdin: BinaryIO, options: Iterable[str]) -> list[Prompt]:
    """The prompts of a .txt or .jsonl file, or of `stdin` with path None.

    A line of text is a prompt as it stands: nothing in it is an escape. A line of .jsonl is an object with one of
    "prompt" (text), "ids" or "messages", and perhaps an "id" and any of the named `options`. Standard input is taken
    for .jsonl if its first line is a JSON object. Raises UserError naming file and line of the first bad one.
    """
    name, content = ("standard input", stdin.read()) if path is None else (str(path), _bytes_of(path))
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines  # the last newline ends a line, it begins none
    if path is None:
        as_json = bool(lines) and isinstance(_json(lines[0]), dict)
    elif path.suffix in (".txt", ".jsonl"):
        as_json = path.suffix == ".jsonl"
    else:
        raise UserError(f"{path}: expected prompts in a file .txt (one a line) or .jsonl (one object a line)")
    allowed = tuple(options)
    prompts = []
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        prompts.append(_object(where, line, allowed) if as_json else Prompt(where, _text(where, line)))
    if not prompts:
        raise UserError(f"{name}: holds no prompt; expected one a line")
    return prompts


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of prompts") from error


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(where: str, line: bytes) -> str:
    try:
        text = line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; expected text") from error
    if not text:
        raise UserError(f"{where}: the prompt is empty; expected some text")
    return text


def _object(where: str, line: bytes, options: Sequence[str]) -> Prompt:
    found = _json(line)
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, got {line[:40]!r}")
    forms = [name for name in _FORMS if name in found]
    if len(forms) != 1:
        raise UserError(f'{where}: expected one of "prompt", "messages" and "ids", got {", ".join(forms) or "none"}')
    (form,) = forms
    given, identity = found.pop(form), found.pop("id", None)
    if not given or not _fits(form, given):
        expected = {
            "prompt": "some text",
            "messages": 'a list of {"role": ..., "content": ...}',
            "ids": "a list of token ids",
        }[form]
        raise UserError(f"{where}: {form} = {reprlib.repr(given)}; expected {expected}")
    for key in found:
        if key not in options:
            raise UserError(f"{where}: {key}: no such key; expected one of {', '.join((*_FORMS, 'id', *options))}")
    n, stop = found.get("n", 1), found.get("stop", [])
    if type(n) is not int or n < 1:
        raise UserError(f"{where}: n = {n!r}; expected a positive whole number")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise UserError(f"{where}: stop = {reprlib.repr(stop)}; expected a list of texts, none of them empty")
    if "logit_bias" in found:
        found["logit_bias"] = _by_token(where, found["logit_bias"])
    return Prompt(where, given, found, identity)


def _by_token(where: str, bias: object) -> dict[int, Any]:
    """JSON has text for keys, where token ids are meant."""
    if isinstance(bias, dict) and all(token.isdecimal() for token in bias):
        return {int(token): value for token, value in bias.items()}
    raise UserError(f'{where}: logit_bias = {reprlib.repr(bias)}; expected numbers by token id, as in {{"17": -1.5}}')


def _fits(form: str, given: object) -> bool:
    if form == "prompt":
        return isinstance(given, str)
    if not isinstance(given, list):
        return False
    if form == "ids":
        return all(type(token) is int for token in given)
    return all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in turn.values())
        for turn in given
    )


def digest(prompts: Sequence[Prompt]) -> str:
    """64 hexadecimal digits; equal for the same prompts with the same options of their own."""
    content = [[prompt.given, prompt.options, prompt.identity] for prompt in prompts]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A prompt as token ids, with all its options: its own, else those of the command."""

    index: int
    prompt: Prompt
    ids: list[int]
    options: dict[str, Any]  # the same names for all requests
    n: int
    stop: tuple[str, ...]


def remaining(requests: Iterable[Request], done: int) -> Iterator[tuple[Request, int]]:
    """The requests that lack samples when the first `done` are there, each with how many of its own are."""
    for request in requests:
        there = min(done, request.n)
        done -= there
        if there < request.n:
            yield request, there


def batches(wanted: Iterable[tuple[Request, int]], rows: int) -> Iterator[list[tuple[Request, int]]]:
    """Neighbours of one n and one stop, as many as make so many rows; at least one."""
    batch: list[tuple[Request, int]] = []
    for request, there in wanted:
        if batch:
            first, _ = batch[0]
            alike = (request.n, request.stop) == (first.n, first.stop)
            if not alike or (len(batch) + 1) * first.n > rows:
                yield batch
                batch = []
        batch.append((request, there))
    if batch:
        yield batch


@contextlib.contextmanager
def continued(path: Path, origin: Mapping[str, Any], order: Iterator[Mapping[str, Any]]) -> Iterator[tuple[Lines, int]]:
    """Opens a .jsonl file of samples to which the command that began it may come back -> (its lines, how many).

    FILE.origin.json beside it says what the samples depend on, and `order` what the line of every sample holds at
    least, as in {"index": 0}. The lines that are there must be the first of that order; whoever appends the rest, one
    by one, loses none and doubles none, whenever it is killed. Raises UserError if another command made the file, if
    a line is not the one expected there, or if another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is writing it; expected to be alone") from error
        _check_origin(path, origin)
        records = Lines.read(path)
        for number, record in enumerate(records, 1):
            _check_line(f"{path}, line {number}", record, next(order, None))
        with contextlib.closing(Lines(path)) as lines:
            try:
                yield lines, len(records)
            finally:
                lines.sync()


def _check_origin(path: Path, origin: Mapping[str, Any]) -> None:
    file = path.with_name(f"{path.name}.origin.json")
    if not path.stat().st_size:  # nothing made yet that could differ
        write_atomically(file, json.dumps(origin, indent=2) + "\n")
        return
    if not file.exists():
        raise UserError(f"{path}: is there, and no {file.name} beside it; expected a new file, or one of this command")
    before = _json(file.read_bytes())
    if not isinstance(before, dict):
        raise UserError(f"{file}: expected a JSON object, as written when {path.name} was begun")
    changed = [
        f"{key}: {reprlib.repr(before.get(key))} -> {reprlib.repr(origin.get(key))}"
        for key in sorted(before.keys() | origin.keys())
        if before.get(key) != origin.get(key)
    ]
    if changed:
        raise UserError(
            f"{path}: was made by another command: {', '.join(changed)}; expected the same, or another --output"
        )


def _check_line(where: str, record: Mapping[str, Any], place: Mapping[str, Any] | None) -> None:
    if place is None:
        raise UserError(f"{where}: expected no more lines, this command makes fewer")
    for key, value in place.items():
        if record.get(key) != value:
            raise UserError(f"{where}: {key} = {reprlib.repr(record.get(key))}; expected {value} there")
