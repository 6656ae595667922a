"""A conversation line by line: what is typed, what streams back; the sampler is a stand-in that repeats its prompt."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import terminals

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.sampling.chat import Chat
from cpmjax.sampling.terminal import HELP, Text, converse

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "golden" / "minicpm-tiny-history" / "tokenizer.model")


class Echo:
    """Answers with its prompt, in pieces; a `!` in it is a Ctrl-C there."""

    config = SimpleNamespace(vocabulary=512, context=200)

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def stream(self, ids: list[int], **options: object) -> Iterator[str]:
        self.calls.append(options)
        prompt = TOKENIZER.decode(ids)
        for character in f"[{prompt}]":
            if character == "!":
                raise KeyboardInterrupt
            yield character


def options() -> dict[str, int | float]:
    return {"max_new_tokens": 20, "temperature": 0.3, "seed": 0}


@pytest.fixture
def talk(monkeypatch, capsys):
    """Types lines to a conversation and returns what is printed; an exception among them is what input() raises."""

    def typed(conversation, *lines, sampler=None, chosen=None, stop=()):
        given = iter([*lines, EOFError()])

        def read(prompt: str) -> str:
            line = next(given)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)
        converse(sampler or Echo(), conversation, options() if chosen is None else chosen, stop)
        return capsys.readouterr().out.splitlines()[1:-1]  # without the greeting and the line that Ctrl-D ends

    return typed


def test_a_chat_has_its_history_and_resets(talk):
    chat = Chat(TOKENIZER, 200, 20)
    assert talk(chat, "Hi", "  ", "again", "/reset", "new") == [
        "[<用户>Hi<AI>]",
        "[<用户>Hi<AI>[<用户>again<AI>]",  # an answer ends at its first marker
        "[<用户>new<AI>]",
    ]


def test_options_and_stop_strings_reach_the_sampler(talk):
    sampler, chat = Echo(), Chat(TOKENIZER, 200, 20)
    printed = talk(chat, "/set temperature 0.5", "/set max_new_tokens 7", "Hi", "/set", sampler=sampler, stop=["."])
    assert sampler.calls == [{"stop": ("<AI>", "<用户>", "."), "max_new_tokens": 7, "temperature": 0.5, "seed": 0}]
    assert chat.max_new_tokens == 7
    assert printed[-3:] == ["max_new_tokens 7", "temperature 0.5", "seed 0"]


def test_mistakes_are_one_line_and_change_nothing(talk):
    chosen = options()
    mistakes = {
        "/set sed 1": "/set sed: expected one of max_new_tokens, temperature, seed (nearest: seed)",
        "/set seed 0.5": "/set seed 0.5: expected a whole number",
        "/set temperature warm": "/set temperature warm: expected a number",
        "/set temperature nan": "temperature = nan: expected a number from 0 (greedy) up",
        "/set max_new_tokens 200": "max_new_tokens = 200: expected 1 to 199, less than the context",
        "/set seed": "/set seed: expected /set OPTION VALUE, as in /set temperature 0.5",
        "/rest": "/rest: expected one of /set, /reset, /save, /help, /quit (nearest: /reset)",
        "/save": "/save: expected a file, as in /save chat.json",
        "/save /nowhere/a": "/nowhere/a: No such file or directory; expected a file that can be written",
    }
    printed = talk(Chat(TOKENIZER, 200, 20), *mistakes, chosen=chosen)
    assert printed == [f"error: {line}" for line in mistakes.values()]
    assert chosen == options()


def test_ctrl_c_ends_an_answer_and_what_came_of_it_stays(talk):
    chat = Chat(TOKENIZER, 200, 20)
    printed = talk(chat, KeyboardInterrupt(), "one!two", "three")
    assert printed[:2] == ["", "[<用户>one"]
    assert [message["content"] for message in chat.messages] == ["one!two", "[", "three", "["]


def test_the_oldest_turns_go_and_it_says_so(talk):
    printed = talk(Chat(TOKENIZER, 60, 20), "a" * 20, "b" * 20)
    assert printed[1] == "(the context is full: the model no longer sees the 2 oldest messages)"
    assert printed[2] == f"[<用户>{'b' * 20}<AI>]"
    (line,) = talk(Chat(TOKENIZER, 60, 20), "c" * 100)
    assert line.startswith("error: the text: ")


def test_a_text_grows(talk, tmp_path):
    text = Text(TOKENIZER, 100, 20)
    file = tmp_path / "text.txt"
    assert talk(text, "Once", " upon", f"/save {file}") == ["[Once]", "[Once[Once] upon]"]
    assert file.read_text() == text.text == "Once[Once] upon[Once[Once] upon]"
    assert "expected a file that can be written" in talk(text, "/save /nowhere/a")[0]
    (line,) = talk(text, "a" * 100)
    assert "expected at most 80, the context of 100 less max_new_tokens = 20; /reset begins another" in line
    assert talk(text, "/reset", "Once") == ["[Once]"]


def test_save_help_and_quit(talk, tmp_path):
    file = tmp_path / "my chat.json"
    printed = talk(Chat(TOKENIZER, 200, 20), "Hi", f"/save {file}", "/help", "/quit", "never read")
    assert "\n".join(printed).endswith(HELP.rpartition("\n")[0])
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


INTERRUPTED_AS_IT_BEGINS_TO_READ = """
import builtins, ctypes, functools, readline, signal, types
from cpmjax.sampling.terminal import converse

def read(prompt, read=input, hooks=iter([functools.partial(ctypes.CDLL(None)["raise"], int(signal.SIGINT))])):
    readline.set_startup_hook(next(hooks, None))  # no line of Python comes between the signal and the waiting for a key
    return read(prompt)

builtins.input = read
conversation = types.SimpleNamespace(dropped=[], stop=(), prompt_ids=lambda text: [text], add=lambda answer: None)
sampler = types.SimpleNamespace(stream=lambda ids, **options: [f"answer to {ids[0]}"])
converse(sampler, conversation, {"max_new_tokens": 1})
"""


def test_a_ctrl_c_as_it_begins_to_read_does_not_wait_for_the_next_line():
    pytest.importorskip("readline")
    with terminals.terminal(INTERRUPTED_AS_IT_BEGINS_TO_READ) as (process, wait, write):
        wait("> ")
        wait("\r\n> ")  # nothing was typed
        write("Hi\n")
        wait("answer to Hi\r\n> ")
        write("\x04")
        assert process.wait(60) == 0
