"""Chat messages -> ids, as the model of a tokenizer was taught to read them: MiniCPM's markers, or ChatML.

A chat template is a program in Jinja that comes with a file of someone else's. It is compared with the two that are
known and never run.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal

from cpmjax.data.tokenizer import Tokenizer, is_unicode
from cpmjax.run.errors import UserError

Message = Mapping[str, str]
Name = Literal["minicpm", "chatml"]

ROLES = ("system", "user", "assistant")

_USER, _ANSWER = "<用户>", "<AI>"
_START, _END = "<|im_start|>", "<|im_end|>"
# As released: MiniCPM-2B and 1B have the first, MiniCPM-2B-128k the second.
_RELEASED: dict[Name, str] = {
    "minicpm": "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}",
    "chatml": "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
_LONGEST = 4096  # characters of a template that is looked at; the released ones have about 200


class Template:
    """How the model of a tokenizer reads a conversation.

    `name` is "minicpm" or "chatml": what the tokenizer's chat template is. If it has none, "chatml" where <|im_start|>
    and <|im_end|> are added tokens and else "minicpm", whose markers are text that any tokenizer has. `stop` are the
    markers at the first of which an answer has ended.

    No content can forge a turn. A marker of MiniCPM's is ordinary text, three pieces long; in a content a zero-width
    space (U+200B) goes behind its "<", so that ids and text hold no other markers than the turns' own. Those of ChatML
    are tokens, and a content is encoded without any added token, character by character as it stands.

    Raises UserError for a chat template that is neither, and for ChatML without its two tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = _recognise(tokenizer)
        self.stop = (_ANSWER, _USER) if self.name == "minicpm" else (_END, _START)
        self._tokenizer = tokenizer
        self._without_added = Tokenizer(tokenizer.model, tokenizer.text_start) if self.name == "chatml" else tokenizer

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of [{"role", "content"}, ...] after a begin of text; roles are system, user and assistant.

        Unless the last message is the assistant's, its answer is what comes next. Raises UserError for no messages, and
        what `check` does.
        """
        check(messages)
        if not messages:
            raise UserError("messages: there are none; expected at least one")
        ids = self._tokenizer.encode(minicpm(messages)) if self.name == "minicpm" else self._chatml(messages)
        return [self._tokenizer.bos, *ids]

    def _chatml(self, messages: Sequence[Message]) -> list[int]:
        start, end = (self._tokenizer.added_tokens[marker] for marker in (_START, _END))
        encode = self._without_added.encode
        ids: list[int] = []
        for message in messages:
            ids += [start, *encode(f"{message['role']}\n{message['content']}"), end, *encode("\n")]
        return ids if messages[-1]["role"] == "assistant" else [*ids, start, *encode("assistant\n")]


def minicpm(messages: Sequence[Message]) -> str:
    """The text that MiniCPM reads for messages that `check` lets pass."""
    text = ""
    for is_user, group in groupby(messages, lambda message: message["role"] == "user"):
        contents = [message["content"].strip() for message in group]
        if is_user:
            text += "".join(f"{_USER}{_broken(content)}{_ANSWER}" for content in contents)
        else:  # joined first: two contents without anything between them could make a marker together
            text += _broken("".join(contents))
    return text


def check(messages: Sequence[Message]) -> None:
    """Raises UserError for a message without a known role, or whose content is no text."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"messages[{index}] = {reprlib.repr(message)}; expected a role and a content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"messages[{index}].role = {reprlib.repr(role)}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not is_unicode(content):
            raise UserError(f"messages[{index}].content = {reprlib.repr(content)}; expected text, all of it Unicode")


def _recognise(tokenizer: Tokenizer) -> Name:
    missing = [marker for marker in (_START, _END) if marker not in tokenizer.added_tokens]
    template = tokenizer.chat_template
    if template is None:
        return "minicpm" if missing else "chatml"
    found = _canonical(template) if len(template) <= _LONGEST else None
    for name, released in _RELEASED.items():
        if found == _canonical(released):
            if name == "chatml" and missing:
                raise UserError(f"tokenizer: chat_template is ChatML; expected {_START} and {_END} as added tokens")
            return name
    shown = reprlib.repr(template)
    raise UserError(f"tokenizer: chat_template = {shown}; expected MiniCPM's or ChatML, no other template is run")


def _canonical(template: str) -> str:
    """The template without what transformers takes no notice of: space in tags and around blocks, kinds of quotes."""

    def literal(found: re.Match) -> str:
        return "" if found[0].isspace() else f"'{found[0][1:-1]}'".replace("\n", "\\n")

    def tag(found: re.Match) -> str:
        return re.sub(r"(?s)\s|(['\"]).*?\1", literal, found[0])

    blocks_alone = re.sub(r"(?m)^[ \t]+(?=\{%)|(?<=%\})\n", "", template)
    return re.sub(r"(?s)\{[{%].*?[%}]\}", tag, blocks_alone)


def _broken(content: str) -> str:
    return re.sub(r"<(?=用户>|AI>)", "<\u200b", content)
