"""A conversation on a terminal: what is typed, what streams back, and the commands in between."""

from __future__ import annotations

import contextlib
import difflib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cpmjax.data.template import Message
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError
from cpmjax.sampling.options import make_options
from cpmjax.sampling.sampler import Sampler

Options = dict[str, Any]  # whole numbers and numbers by name

HELP = """\
/set                shows the options
/set OPTION VALUE   changes one, as in /set temperature 0.5
/reset              forgets what was said
/save FILE          writes what was said
/help               shows this
/quit               leaves, and so does Ctrl-D
Ctrl-C              ends an answer; what came of it is kept
A line that begins with / is a command; with a space in front it is text."""
_SECONDS_BETWEEN_LOOKS = 0.1
_COMMANDS = ("/set", "/reset", "/save", "/help", "/quit")


class Conversation(Protocol):
    """What was said so far: a `Chat`, or a `Text`."""

    dropped: list[Message]
    max_new_tokens: int

    @property
    def stop(self) -> tuple[str, ...]: ...
    def prompt_ids(self, text: str) -> list[int]: ...
    def add(self, answer: str) -> None: ...
    def reset(self) -> None: ...
    def save(self, path: str | Path) -> None: ...


class Text:
    """One text that the user and the model write by turns, for a model that knows of no chat."""

    def __init__(self, tokenizer: Tokenizer, context: int, max_new_tokens: int) -> None:
        self.stop: tuple[str, ...] = ()
        self.dropped: list[Message] = []  # nothing: a text that is too long is refused
        self.max_new_tokens = max_new_tokens
        self.text = ""
        self._tokenizer = tokenizer
        self._context = context
        self._asked = ""

    def prompt_ids(self, text: str) -> list[int]:
        """The text so far with what the user adds; this becomes part of it with the answer."""
        ids = [self._tokenizer.bos, *self._tokenizer.encode(self.text + text)]
        if len(ids) + self.max_new_tokens > self._context:
            raise UserError(
                f"the text: {len(ids)} tokens; expected at most {self._context - self.max_new_tokens}, the context of "
                f"{self._context} less max_new_tokens = {self.max_new_tokens}; /reset begins another"
            )
        self._asked = text
        return ids

    def add(self, answer: str) -> None:
        self.text += self._asked + answer

    def reset(self) -> None:
        self.text = ""

    def save(self, path: str | Path) -> None:
        """Writes the text as it is. Raises UserError where no file can be written."""
        try:
            write_atomically(Path(path).expanduser(), self.text)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected a file that can be written") from error


def converse(sampler: Sampler, conversation: Conversation, options: Options, stop: Sequence[str] = ()) -> None:
    """Reads lines from the terminal and answers them until Ctrl-D or /quit; `options` are those of the sampler."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its editing and its history
    print("/help says what can be typed; Ctrl-D leaves")
    while True:
        try:
            line = _read()
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                _obey(line, sampler, conversation, options)
            elif line.strip():
                _answer(line, sampler, conversation, options, stop)
        except UserError as error:
            print("error:", error)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _read() -> str:
    """A line of the terminal.

    A Ctrl-C that comes when Python does not wait for a key yet, it would notice when the line has ended, and drop that
    line. A timer makes it look.
    """
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS)
    try:
        return input("> ")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _answer(text: str, sampler: Sampler, conversation: Conversation, options: Options, stop: Sequence[str]) -> None:
    """Streams an answer, as much of it as the user waits for."""
    conversation.max_new_tokens = int(options["max_new_tokens"])
    ids = conversation.prompt_ids(text)
    if conversation.dropped:
        print(f"(the context is full: the model no longer sees the {len(conversation.dropped)} oldest messages)")
    answer = ""
    with contextlib.suppress(KeyboardInterrupt):
        for piece in sampler.stream(ids, stop=(*conversation.stop, *stop), **options):
            answer += piece
            print(piece, end="", flush=True)
    print()
    conversation.add(answer)


def _obey(line: str, sampler: Sampler, conversation: Conversation, options: Options) -> None:
    command, _, rest = line.partition(" ")
    words = rest.split()
    if command == "/help":
        print(HELP)
    elif command == "/reset":
        conversation.reset()
    elif command == "/save":
        if not rest.strip():
            raise UserError("/save: expected a file, as in /save chat.json")
        conversation.save(rest.strip())
    elif command != "/set":
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"{command}: expected one of {', '.join(_COMMANDS)}{hint}")
    elif not words:
        print("\n".join(f"{name} {value}" for name, value in options.items()))
    elif len(words) == 2:
        options[words[0]] = _value(sampler, options, *words)
    else:
        raise UserError(f"{line}: expected /set OPTION VALUE, as in /set temperature 0.5")


def _value(sampler: Sampler, options: Options, name: str, text: str) -> int | float:
    """The value of an option, checked. Raises UserError naming both."""
    if name not in options:
        near = difflib.get_close_matches(name, options, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise UserError(f"/set {name}: expected one of {', '.join(options)}{hint}")
    kind = type(options[name])
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"/set {name} {text}: expected {'a whole number' if kind is int else 'a number'}") from error
    if name != "max_new_tokens":
        make_options(1, sampler.config.vocabulary, **{name: value})
    elif not 0 < value < sampler.config.context:
        raise UserError(f"{name} = {text}: expected 1 to {sampler.config.context - 1}, less than the context")
    return value
