"""A conversation within the context of a model: turns in, prompt ids out, the oldest turns dropped whole."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path

from cpmjax.data.template import Message, Template, check
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError

# Options of a Sampler: the defaults of chat() in OpenBMB's modeling_minicpm.py, and what their README advises instead.
RELEASED_OPTIONS = {"temperature": 0.3, "top_p": 0.8}
ADVISED_OPTIONS = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02}


class Chat:
    """The turns of a user and a model, and what of them the model is shown.

        chat = Chat(tokenizer, context=4096, max_new_tokens=512)
        ids = chat.prompt_ids("Hello!")    # then sample with stop=chat.stop
        chat.add(answer)

    A turn is a user's message and the answer to it. Where the context would not hold all turns and `max_new_tokens`
    more, the oldest ones are no longer shown to the model, whole and for good; the system text always is. `messages`
    are all turns, [{"role", "content"}, ...], also those that are not shown any more. `context`, `max_new_tokens` and
    `system` may be set at any time.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, max_new_tokens: int, system: str | None = None) -> None:
        """Sizes are in tokens. Raises UserError for a tokenizer whose chat template is not known."""
        self._template = Template(tokenizer)
        self.stop = self._template.stop  # the markers at the first of which an answer has ended
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forgets all turns; the system text stays."""
        self.messages: list[Message] = []
        self.dropped: list[Message] = []  # what the latest prompt was the first to leave out
        self._shown = 0  # the first message that the model is shown
        self._asked: Message | None = None

    def prompt_ids(self, text: str) -> list[int]:
        """Ids that ask for the answer to `text`, begin of text first; `dropped` are the messages it had to let go.

        A text that gets no answer through `add` is no part of the conversation. Raises UserError, and changes nothing,
        where the context does not hold the text even without any turn before it.
        """
        room = self.context - self.max_new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens = {self.max_new_tokens}; expected less than the context of {self.context}")
        asked = {"role": "user", "content": text}
        shown = self._shown
        while len(ids := self._template.encode([*self._system(), *self.messages[shown:], asked])) > room:
            if shown == len(self.messages):
                around = "the system text and the markers" if self.system else "the markers"
                raise UserError(
                    f"the text: {len(ids)} tokens with {around}; expected at most {room}, "
                    f"the context of {self.context} less max_new_tokens = {self.max_new_tokens}"
                )
            shown += 2
        self.dropped = self.messages[self._shown : shown]
        self._shown, self._asked = shown, asked
        return ids

    def add(self, answer: str) -> None:
        """Takes the answer to the latest prompt, up to the first of the markers in `stop`."""
        if self._asked is None:
            raise UserError("an answer without a question; expected prompt_ids(text) before add(answer)")
        answer = re.split("|".join(map(re.escape, self.stop)), answer, maxsplit=1)[0]
        self.messages += [self._asked, {"role": "assistant", "content": answer}]
        self._asked = None

    def save(self, path: str | Path) -> None:
        """Writes the system text and all turns as JSON: {"messages": [{"role", "content"}, ...]}.

        Raises UserError where it cannot.
        """
        content = {"messages": [*self._system(), *self.messages]}
        try:
            write_atomically(Path(path).expanduser(), json.dumps(content, ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected a file that can be written") from error

    def load(self, path: str | Path) -> None:
        """Goes on from a file that `save` wrote. Raises UserError, and changes nothing, if it is another."""
        system, turns = _read(Path(path).expanduser())
        self.reset()
        self.system, self.messages = system, turns

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []


def _read(path: Path) -> tuple[str | None, list[Message]]:
    """The system text and the turns in a file."""
    expected = 'expected {"messages": [...]}, users and assistants in turn, after a system text or none'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {expected}") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list):
        raise UserError(f"{path}: {reprlib.repr(content)}; {expected}")
    try:
        check(messages)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    has_system = bool(messages) and messages[0]["role"] == "system"
    turns = messages[has_system:]
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise UserError(f"{path}: messages of {reprlib.repr(roles)}; {expected}")
    return messages[0]["content"] if has_system else None, turns
