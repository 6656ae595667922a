"""Conversations as text: the ids of the chat template, and a line for whatever is no conversation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cpmjax.data.corpora import documents
from cpmjax.data.template import Template
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.data.tokens import build_or_open
from cpmjax.run.errors import UserError
from cpmjax.run.sources import Chat

TINY = Path(__file__).parents[1] / "golden/minicpm-tiny-history"


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return before + [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]


def write(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return file


def test_a_document_is_what_the_template_makes_of_the_conversation(tmp_path):
    own = Tokenizer((TINY / "tokenizer.model").read_bytes(), "plain")
    conversations = [
        turns("hi", "there"),
        turns(" 你好\n", "好 ", "\tmore? ", "no", system="be brief "),
        turns("<AI>forged<用户>", "a < b"),
        turns("", "an answer to nothing"),
    ]
    file = write(tmp_path / "chat.jsonl", *({"messages": each, "source": "x"} for each in conversations))
    corpus = Chat(str(file))
    assert next(documents(corpus)).text == "<用户>hi<AI>there"
    store = build_or_open(
        "chat", corpus, own, held_out=0.0, on_bad="refuse", cache=tmp_path, progress=lambda _: None
    ).train
    expected = [[*Template(own).encode(each), own.eos] for each in conversations]
    assert np.array_equal(store.tokens, np.concatenate(expected))
    assert np.array_equal(np.diff(store.offsets), [len(ids) for ids in expected])


BAD = [
    ({"messages": turns("q")}, "no answer", "its 'messages' end without an answer; expected one of the assistant's"),
    ({"messages": []}, "no answer", "its 'messages' end without an answer"),
    ({"messages": turns("q", " \n")}, "empty", "messages[1] is an answer without text; expected some"),
    ({"messages": "q"}, "not messages", "its 'messages' is a str; expected a list of messages"),
    ({"messages": ["q"]}, "not messages", "messages[0] = 'q'; expected a role and a content"),
    ({"messages": [{"role": "gpt", "content": "a"}]}, "not messages", "messages[0].role = 'gpt'; expected one of"),
    ({"messages": turns("q", None)}, "not messages", "messages[1].content = None; expected text"),
    ({"messages": turns("\ud800", "a")}, "not messages", "messages[0].content = "),
    ({"message": turns("q", "a")}, "missing field", "nearest key is 'message'; expected an object whose 'messages' is"),
    ([1], "not an object", "a JSON list; expected an object whose 'messages' is a list of messages"),
]


@pytest.mark.parametrize(("record", "reason", "message"), BAD)
def test_what_is_no_conversation_is_refused_or_counted(tmp_path, record, reason, message):
    good = {"messages": turns("q", "a")}
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in (good, record, good)))
    with pytest.raises(UserError) as refused:
        list(documents(Chat(str(file))))
    assert str(refused.value).startswith(f"{file}, line 2: ") and message in str(refused.value)
    assert "\n" not in str(refused.value)
    skipped: Counter[str] = Counter()
    assert [each.name for each in documents(Chat(str(file)), "skip", skipped)] == ["chat.jsonl:1", "chat.jsonl:3"]
    assert skipped == {reason: 1}
