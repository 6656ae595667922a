"""Conversations in jsonl files, as text to pre-train on: the instruction data of a decay stage.

A document is what MiniCPM reads for the whole conversation (`cpmjax.data.template`), whatever the tokenizer. Every
token of it is trained on, questions too, as in any other text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from cpmjax.data.documents import Bad, Document, json_object, missing
from cpmjax.data.template import check, minicpm
from cpmjax.data.text_files import each_line
from cpmjax.run.errors import UserError

_KIND = "list of messages"


def chat_files(path: str, field: str) -> Iterator[Document | Bad]:
    """The conversation of each line, which must end with an answer, and with no answer that says nothing."""
    return each_line(path, partial(_conversation, field=field))


def _conversation(name: str, raw: bytes, place: str, field: str, offset: int = 0) -> Document | Bad:
    record = json_object(raw, place, f"expected an object whose {field!r} is a {_KIND}", offset)
    if isinstance(record, Bad):
        return record
    if field not in record:
        return missing(place, field, list(record), _KIND)
    messages = record[field]
    if not isinstance(messages, list):
        return Bad("not messages", f"{place}: its {field!r} is a {type(messages).__name__}; expected a {_KIND}")
    try:
        check(messages)
    except UserError as error:
        return Bad("not messages", f"{place}: {error}")
    if not messages or messages[-1]["role"] != "assistant":
        return Bad("no answer", f"{place}: its {field!r} end without an answer; expected one of the assistant's")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not message["content"].strip():
            return Bad("empty", f"{place}: messages[{index}] is an answer without text; expected some")
    return Document(name, minicpm(messages))
