"""Lines of prompts in, lines of samples out: every bad line named, nothing lost or doubled whenever it is killed."""

from __future__ import annotations

import io
import json
import random
import time
from pathlib import Path

import pytest
from sampling import slow_writer

from cpmjax.run.errors import UserError
from cpmjax.sampling.promptfile import Prompt, Request, batches, continued, digest, read_prompts, remaining

OPTIONS = ("temperature", "seed", "n", "stop")
ORIGIN = {"weights": 1, "temperature": 0.5}


def read(path: Path, content: bytes) -> list[Prompt]:
    path.write_bytes(content)
    return read_prompts(path, io.BytesIO(), OPTIONS)


def piped(content: bytes) -> list[Prompt]:
    return read_prompts(None, io.BytesIO(content), OPTIONS)


def test_a_line_of_text_is_a_prompt_as_it_stands(tmp_path):
    file = tmp_path / "p.txt"
    prompts = read(file, '\ufeffOne \\n two\r\n  你好\u2028🙂 \n{"prompt": 1}'.encode())
    assert [prompt.given for prompt in prompts] == ["One \\n two", "  你好\u2028🙂 ", '{"prompt": 1}']
    assert [prompt.where for prompt in prompts] == [f"{file}, line {number}" for number in (1, 2, 3)]
    assert all(prompt.options == {} and prompt.identity is None for prompt in prompts)


def test_an_object_a_line(tmp_path):
    turns = [{"role": "user", "content": "Hi"}]
    lines = [
        {"prompt": "One\ntwo", "id": "a", "temperature": 0.5},
        {"ids": [1, 2, 3], "seed": 4},
        {"messages": turns, "id": 0},
    ]
    prompts = read(tmp_path / "p.jsonl", b"\n".join(json.dumps(line).encode() for line in lines) + b"\n")
    assert [(prompt.given, prompt.options, prompt.identity) for prompt in prompts] == [
        ("One\ntwo", {"temperature": 0.5}, "a"),
        ([1, 2, 3], {"seed": 4}, None),
        (turns, {}, 0),
    ]
    assert [prompt.is_conversation for prompt in prompts] == [False, False, True]


def test_standard_input_is_what_its_first_line_says():
    assert [prompt.given for prompt in piped(b"One\ntwo\n")] == ["One", "two"]
    assert [prompt.given for prompt in piped(b'{"ids": [1]}\n{"prompt": "a"}\n')] == [[1], "a"]
    assert [prompt.given for prompt in piped(b"{one}\n")] == ["{one}"]
    with pytest.raises(UserError, match="standard input, line 2: expected a JSON object"):
        piped(b'{"ids": [1]}\ntwo\n')


FORMS = 'expected one of "prompt", "messages" and "ids"'
BAD_LINES = {
    b"two": "expected a JSON object, got b'two'",
    b"": "expected a JSON object, got b''",
    b'{"prompt": "a"': "expected a JSON object",
    b"[" * 100_000: "expected a JSON object",
    b'["a"]': "expected a JSON object",
    b"{}": f"{FORMS}, got none",
    b'{"prompt": "a", "ids": [1]}': f"{FORMS}, got prompt, ids",
    b'{"prompt": ""}': "prompt = ''; expected some text",
    b'{"prompt": 3}': "prompt = 3; expected some text",
    b'{"ids": [1, true]}': "ids = [1, True]; expected a list of token ids",
    b'{"ids": "12"}': "ids = '12'; expected a list of token ids",
    b'{"messages": []}': "messages = []; expected a list of",
    b'{"messages": [{"role": "user"}]}': "messages = [{'role': 'user'}]; expected a list of",
    b'{"prompt": "a", "temprature": 1}': (
        "temprature: no such key; expected one of prompt, messages, ids, id, temperature, seed, n, stop"
    ),
    b'{"prompt": "\xff"}': "expected a JSON object",
    b'{"prompt": "a", "n": 0}': "n = 0; expected a positive whole number",
    b'{"prompt": "a", "stop": "b"}': "stop = 'b'; expected a list of texts, none of them empty",
    b'{"prompt": "a", "stop": [""]}': "stop = ['']; expected a list of texts, none of them empty",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30].decode("latin1"))
def test_a_bad_line_is_named(tmp_path, line):
    file = tmp_path / "p.jsonl"
    with pytest.raises(UserError) as caught:
        read(file, b'{"prompt": "a"}\n' + line + b"\n")
    assert str(caught.value).startswith(f"{file}, line 2: {BAD_LINES[line]}")
    assert len(str(caught.value)) < 300 + len(str(file))


def test_bad_text_and_bad_files(tmp_path):
    file = tmp_path / "p.txt"
    with pytest.raises(UserError, match="line 2: the prompt is empty; expected some text"):
        read(file, b"a\n\nb\n")
    with pytest.raises(UserError, match="line 1: byte 2 is not UTF-8; expected text"):
        read(file, b"a\xff\n")
    with pytest.raises(UserError, match="holds no prompt; expected one a line"):
        read(file, b"")
    with pytest.raises(UserError, match=r"p.csv: expected prompts in a file .txt \(one a line\) or .jsonl"):
        read(tmp_path / "p.csv", b"a\n")
    with pytest.raises(UserError, match=r"none.txt: No such file or directory; expected a file of prompts"):
        read_prompts(tmp_path / "none.txt", io.BytesIO(), OPTIONS)


def test_the_digest_sees_every_change():
    base = Prompt("here", "a", {"seed": 1}, "x")
    assert digest([base]) == digest([Prompt("elsewhere", "a", {"seed": 1}, "x")])
    others = [
        Prompt("here", "b", {"seed": 1}, "x"),
        Prompt("here", "a", {"seed": 2}, "x"),
        Prompt("here", "a", {}, "x"),
    ]
    assert len({digest([each]) for each in [base, *others]} | {digest([base, base])}) == 5


def request(index: int, n: int, stop: tuple[str, ...] = ()) -> Request:
    return Request(index, Prompt("", "a"), [1], {}, n, stop)


def test_batches_hold_what_is_missing_in_order():
    draw = random.Random(0)
    for _ in range(500):
        requests = [request(i, draw.randint(1, 3), draw.choice([(), (".",)])) for i in range(draw.randint(1, 12))]
        order = [(each.index, number) for each in requests for number in range(each.n)]
        done, rows = draw.randint(0, len(order)), draw.randint(1, 8)
        found = []
        for batch in batches(remaining(requests, done), rows):
            assert len(batch) == 1 or sum(each.n for each, _ in batch) <= rows
            assert len({(each.n, each.stop) for each, _ in batch}) == 1
            found += [(each.index, number) for each, there in batch for number in range(there, each.n)]
        assert found == order[done:]


# The output.


def write(path: Path, indices: range, origin=ORIGIN, total: int = 40) -> int:
    """Goes on to the end of `indices`; returns how many lines were there."""
    with continued(path, origin, ({"index": index} for index in range(total))) as (lines, done):
        for index in indices[done:]:
            lines.append({"index": index, "text": "x" * index})
        return done


def indices_of(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_bytes().splitlines()]


def test_an_output_is_gone_on_with(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    assert [write(path, range(3)), write(path, range(3)), write(path, range(40))] == [0, 3, 3]
    assert indices_of(path) == list(range(40))
    assert json.loads((tmp_path / "new" / "out.jsonl.origin.json").read_text()) == ORIGIN


def test_a_line_cut_short_is_made_again(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, range(5))
    whole = path.read_bytes()
    for cut in range(1, len(whole), 3):
        path.write_bytes(whole[:-cut])
        assert write(path, range(5)) == whole[:-cut].count(b"\n")
        assert path.read_bytes() == whole


def refusal(path: Path, **changes) -> str:
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        write(path, range(40), **changes)
    assert path.read_bytes() == before
    return str(caught.value).removeprefix(str(path))


def test_another_command_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, range(3))
    assert refusal(path, origin={"weights": 2, "temperature": 0.5, "top_k": 3}) == (
        ": was made by another command: top_k: None -> 3, weights: 1 -> 2; expected the same, or another --output"
    )
    assert refusal(path, total=2) == ", line 3: expected no more lines, this command makes fewer"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert refusal(path) == ", line 2: index = 2; expected 1 there"
    path.write_bytes(lines[0] + b"{1}\n")
    assert refusal(path).startswith(", line 2: expected a JSON object")
    (tmp_path / "out.jsonl.origin.json").write_text("{")
    assert "expected a JSON object, as written when out.jsonl was begun" in refusal(path)
    (tmp_path / "out.jsonl.origin.json").unlink()
    path.write_bytes(b"somebody's text without a newline")
    assert refusal(path).startswith(": is there, and no out.jsonl.origin.json beside it; expected a new file")
    path.write_bytes(b"")
    write(path, range(40), origin={"weights": 2})
    assert indices_of(path) == list(range(40))


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with continued(path, ORIGIN, iter(())):
        assert refusal(path) == ": another process is writing it; expected to be alone"
    write(path, range(1))


def test_killed_again_and_again(tmp_path):
    path, draw = tmp_path / "out.jsonl", random.Random(0)
    for goal in (1, 30, 31, 80, 140, slow_writer.LINES):
        process = slow_writer.start(path)
        while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= goal):
            time.sleep(draw.uniform(0, 0.002))
        if goal < slow_writer.LINES:
            process.kill()
        process.join()
        assert process.exitcode == (-9 if goal < slow_writer.LINES else 0)
        found = [json.loads(line)["index"] for line in path.read_bytes().split(b"\n")[:-1]]
        assert found == list(range(len(found)))
    assert len(found) == slow_writer.LINES
