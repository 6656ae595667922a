"""python -m cpmjax.sample as a user meets it: files, pipes, kills, every checkpoint of a series, a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jobs
import pytest
import terminals
import tunnel_jobs
from formats.conversions import HISTORY, copy_history, run_with_average

import cpmjax.sample
from cpmjax.formats.loading import load, load_tokenizer
from cpmjax.run import cli
from cpmjax.run.interrupt import SAVED_AND_STOPPED
from cpmjax.sampling.sampler import Sample, Sampler

HELP = "expected what python -m cpmjax.sample --help says"
STEPS = (300_000, 390_000)
FLAGS = ("--steps", "all", "--n", "2", "--max-new-tokens", "4", "--batch", "4")
TEXTS = ["Once upon a time", "你好", "def f(x):", "a", "The 🙂", "1 + 1 ="]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What jobs compile goes to a folder of the session, not to the user's."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Hugging Face folder with MiniCPM's chat template."""
    return copy_history(tmp_path_factory.mktemp("sample") / "model", step300000="pytorch_model.bin")


def command(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    """`python -m cpmjax.sample` in this process: (exit code, stdout, stderr)."""
    before, stdout, stderr = (sys.argv, sys.stdin), io.StringIO(), io.StringIO()
    sys.argv = ["sample", *map(str, arguments)]
    sys.stdin = SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False)  # type: ignore[assignment]
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as caught,
        ):
            cli.main(cpmjax.sample.main)
    finally:
        sys.argv, sys.stdin = before
    return int(caught.value.code or 0), stdout.getvalue(), stderr.getvalue()


def sampled(*arguments: str | Path, stdin: bytes = b"") -> list[dict[str, Any]]:
    """The lines on the standard output of a command that must end well."""
    code, stdout, stderr = command(*arguments, stdin=stdin)
    assert code == 0, stderr
    return [json.loads(line) for line in stdout.encode().splitlines()]


def refused(*arguments: str | Path, stdin: bytes = b"a\n") -> str:
    code, _, stderr = command(*arguments, stdin=stdin)
    return jobs.error_line(code, stderr)


def prompts_file(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n")
    return file


# What comes out.


def test_lines_are_what_the_sampler_says(model, tmp_path):
    flags = ("--max-new-tokens", "6", "--n", "2", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5")
    lines = sampled(model, "--prompts", prompts_file(tmp_path), *flags, "--logprobs", "2")
    sampler = Sampler(load(model), load_tokenizer(model))
    expected = sampler(TEXTS, max_new_tokens=6, n=2, temperature=0.8, top_p=0.9, seed=5, logprobs=2)
    assert [(line["index"], line["sample"]) for line in lines] == [(i, k) for i in range(len(TEXTS)) for k in (0, 1)]
    for line, sample in zip(lines, expected, strict=True):
        keys = ["index", "sample", "prompt", "text", "tokens", "finish_reason", "logprobs", "top_logprobs"]
        assert list(line) == keys
        assert line["prompt"] == TEXTS[line["index"]]
        assert (line["text"], line["tokens"]) == (sample.text, sample.tokens)
        assert line["finish_reason"] == sample.finish_reason
        assert line["logprobs"] == pytest.approx(sample.logprobs, abs=1e-5)
        assert [len(each) for each in line["top_logprobs"]] == [2] * len(line["tokens"])


@pytest.mark.slow
def test_a_line_has_options_of_its_own(model):
    tokenizer = load_tokenizer(model)
    turns = [{"role": "user", "content": "Hi"}]
    asked = [
        {"prompt": "Once", "id": "first", "temperature": 0, "max_new_tokens": 4},
        {"ids": [1, 5, 6], "n": 2, "seed": 7},
        {"messages": turns, "temperature": 0},
        {"prompt": "Once", "temperature": 0, "logit_bias": {"17": 1000}, "max_new_tokens": 3},
    ]
    stdin = "\n".join(map(json.dumps, asked)).encode()
    lines = sampled(model, "--max-new-tokens", "5", stdin=stdin)
    assert [line["prompt"] for line in lines] == ["Once", [1, 5, 6], [1, 5, 6], turns, "Once"]
    assert [line.get("id") for line in lines] == ["first", None, None, None, None]
    assert [line.get("sample") for line in lines] == [None, 0, 1, None, None]
    sampler = Sampler(load(model), tokenizer)
    once, *_, chat, biased = lines
    assert once["tokens"] == sampler("Once", max_new_tokens=4, temperature=0)[0].tokens
    assert [line["tokens"] for line in lines[1:3]] == [
        sample.tokens for sample in sampler([[1, 5, 6]], max_new_tokens=5, n=2, seed=7)
    ]
    template = [tokenizer.bos, *tokenizer.encode("<用户>Hi<AI>")]
    assert chat["text"] == sampler([template], max_new_tokens=5, temperature=0, stop=["<AI>", "<用户>"])[0].text
    assert biased["tokens"] == [17] * 3
    # What a user says on a line of text is the same.
    (same,) = sampled(model, "--max-new-tokens", "5", "--temperature", "0", "--chat-template", stdin=b"Hi\n")
    assert same["tokens"] == chat["tokens"]


def test_the_average_of_a_run(model, tmp_path):
    run, flags = run_with_average(tmp_path / "run"), ("--max-new-tokens", "6", "--average")
    (line,) = sampled(run, *flags, stdin=b"Once\n")
    (expected,) = Sampler(load(HISTORY, 300_000), load_tokenizer(model))(["Once"], max_new_tokens=6)
    (other,) = sampled(run, *flags[:-1], stdin=b"Once\n")
    assert line["tokens"] == expected.tokens != other["tokens"]
    output = tmp_path / "samples.jsonl"
    message = refused(run, *flags, "--steps", "400000,390000", "--output", output)
    assert message.startswith(f"{run}/checkpoints/390000 has no average: expected one of a run with training.ema")
    assert refused(model, *flags) == f"{model}: holds no run; expected one to load the average of its parameters from"
    assert not output.exists()


def test_a_model_without_a_tokenizer_takes_ids_and_gives_ids(tmp_path):
    model = copy_history(tmp_path / "model", step300000="pytorch_model.bin")
    (model / "tokenizer.model").unlink()
    lines = sampled(model, *FLAGS[2:], stdin=b'{"ids": [1, 2]}\n{"ids": [3]}\n')
    assert [(len(line["tokens"]), line["text"]) for line in lines] == [(4, "")] * 4
    line = refused(model, stdin=b"a\n")
    assert line == "standard input, line 1: prompt = 'a': expected token ids, since the sampler has no tokenizer"
    line = refused(model, "--chat-template", stdin=b"a\n")
    assert line == f"{model}: has no tokenizer; expected one for what goes through a chat template"


def test_every_step_with_one_compilation(tmp_path):
    file = prompts_file(tmp_path)
    flags = ("--prompts", file, "--max-new-tokens", "17", "--temperature", "0.5")
    with tunnel_jobs.counted_compilations() as once:
        first = sampled(HISTORY, "--step", "300000", *flags)
    with tunnel_jobs.counted_compilations() as again:
        lines = sampled(HISTORY, "--steps", "all", *flags)
    assert any("decode" in name for name in once) and any("prefill" in name for name in once)
    assert again == []
    assert [(line["step"], line["index"]) for line in lines] == [(s, i) for s in STEPS for i in range(len(TEXTS))]
    assert lines[: len(TEXTS)] == first
    assert lines[len(TEXTS) :] == sampled(HISTORY, *flags)  # the newest
    assert [line["tokens"] for line in lines[: len(TEXTS)]] != [line["tokens"] for line in lines[len(TEXTS) :]]


def test_a_batch_is_what_suits_the_device(monkeypatch):
    sizes = []

    def sampler(*arguments, max_batch, **keywords):
        def call(prompts, **options):
            sizes.append((len(prompts), max_batch))
            return [Sample(ids, [7], "", [], None, None, "length") for ids in prompts]

        return call

    monkeypatch.setattr(cpmjax.sample, "Sampler", sampler)
    stdin = b'{"ids": [5]}\n' * 40
    for backend, flags, expected in (
        ("cpu", (), [(32, None), (8, None)]),
        ("tpu", (), [(40, None)]),
        ("tpu", ("--batch", "20"), [(20, 20), (20, 20)]),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        sizes.clear()
        lines = sampled(HISTORY, *flags, stdin=stdin)
        assert (len(lines), sizes) == (40, expected)


# Interruptions.


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[tuple[str | Path, ...], bytes]:
    """A command without its --output, and what it writes when nothing happens."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = (HISTORY, "--prompts", prompts_file(folder), *FLAGS)
    code, stdout, stderr = command(*arguments, "--output", folder / "out.jsonl")
    assert (code, stdout) == (0, ""), stderr
    assert stderr.splitlines()[-1].startswith(f"{folder / 'out.jsonl'}: 24 of 24 samples; ")
    return arguments, (folder / "out.jsonl").read_bytes()


def test_the_same_command_goes_on_from_any_place(whole, tmp_path):
    arguments, content = whole
    lines = [json.loads(line) for line in content.splitlines()]
    expected = [(step, i, k) for step in STEPS for i in range(len(TEXTS)) for k in (0, 1)]
    assert [(line["step"], line["index"], line["sample"]) for line in lines] == expected
    out = tmp_path / "out.jsonl"
    assert command(*arguments, "--output", out)[0] == 0
    for length in random.Random(0).sample(range(len(content)), 6):
        out.write_bytes(content[:length])
        # How many rows run at a time may change, as it must where the memory was too small.
        code, _, stderr = command(*arguments, "--batch", "3", "--output", out)
        assert code == 0, stderr
        assert out.read_bytes() == content
    code, _, stderr = command(*arguments, "--output", out)
    assert (code, stderr) == (0, f"{out}: 24 of 24 samples; 0 tokens, 0 tokens per second\n")


def test_another_command_is_refused(whole, tmp_path):
    arguments, content = whole
    out = tmp_path / "out.jsonl"
    assert command(*arguments, "--output", out)[0] == 0
    assert refused(*arguments, "--temperature", "0.5", "--top-k", "3", "--output", out) == (
        f"{out}: was made by another command: temperature: 1.0 -> 0.5, top_k: 0 -> 3; "
        "expected the same, or another --output"
    )
    assert refused(HISTORY, "--step", "390000", *arguments[1:3], *FLAGS[2:], "--output", out).startswith(
        f"{out}: was made by another command: weights: "
    )
    assert out.read_bytes() == content


def test_a_signal_finishes_the_batch(whole, tmp_path, monkeypatch):
    arguments, content = whole
    out = tmp_path / "out.jsonl"
    add = cpmjax.sample.Progress.add

    def add_and_signal(progress, tokens: int) -> None:
        add(progress, tokens)
        if progress._done == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cpmjax.sample.Progress, "add", add_and_signal)
    code, _, stderr = command(*arguments, "--output", out)
    assert code == SAVED_AND_STOPPED
    last = stderr.splitlines()[-1]
    assert last == f"SIGTERM: 8 of 24 samples are in {out}; the same command goes on from there"
    assert out.read_bytes() == b"".join(content.splitlines(keepends=True)[:8])
    assert command(*arguments, "--output", out)[0] == 0
    assert out.read_bytes() == content


def start(*arguments: str | Path, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "cpmjax.sample", *map(str, arguments)], **streams)


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_killed_again_and_again(whole, tmp_path):
    arguments, content = whole
    out = tmp_path / "out.jsonl"
    for goal in (1, 5, 9, 13, 17):
        process = start(*arguments, "--output", out, stderr=subprocess.DEVNULL)
        reached = jobs.signal_at(
            process, lambda g=goal: out.exists() and out.read_bytes().count(b"\n") >= g, signal.SIGKILL
        )
        process.wait()
        assert reached
        assert content.startswith(out.read_bytes())
    assert start(*arguments, "--output", out, stderr=subprocess.DEVNULL).wait() == 0
    assert out.read_bytes() == content


# The command line.


@pytest.mark.slow
def test_a_pipe_in_and_a_pipe_out(model):
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(model, "--max-new-tokens", "3", **streams)
    stdout, stderr = process.communicate("\n".join(TEXTS).encode(), timeout=120)
    assert process.returncode == 0, stderr
    assert [json.loads(line)["prompt"] for line in stdout.splitlines()] == TEXTS
    process = start(model, "--max-new-tokens", "3", **streams)
    assert process.stdout is not None and process.stdin is not None and process.stderr is not None
    process.stdout.close()  # as `| head -0` does
    process.stdin.write(b"a\n")
    process.stdin.close()
    assert (process.wait(120), b"Traceback" in process.stderr.read()) == (0, False)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_text_comes_as_it_is_or_as_escapes(encoding):
    prompts = ["你好\u2028🙂", "é\x85"]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(HISTORY, "--max-new-tokens", "2", env=environment, **streams)
    stdout, stderr = process.communicate("\n".join(prompts).encode(), timeout=120)
    assert process.returncode == 0, stderr
    assert [json.loads(line)["prompt"] for line in stdout.splitlines()] == prompts
    assert all((prompt.encode() in stdout) == (encoding == "utf-8") for prompt in prompts)


def test_help_shows_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        cpmjax.sample.main(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"--{name.replace('_', '-')}" in shown for name in cpmjax.sample.OPTIONS)
    for words in ("/help says", "FILE.origin.json", '"stop": ["."]', "--steps LIST|all", "exit code is 75"):
        assert words in shown


MISTAKES: dict[tuple[str, ...], str] = {
    (): f"command line: the following arguments are required: MODEL; {HELP}",
    ("MODEL", "--temprature", "1"): f"command line: unrecognized arguments: --temprature 1; {HELP}",
    ("MODEL", "--top-k", "few"): f"command line: argument --top-k: invalid int value: 'few'; {HELP}",
    ("MODEL", "--n", "0"): f"command line: argument --n: expected a whole number from 1 up, got '0'; {HELP}",
    ("MODEL", "--step", "1", "--steps", "all"): (
        f"command line: argument --steps: not allowed with argument --step; {HELP}"
    ),
    ("MODEL", "--raw", "--chat-template"): (
        f"command line: argument --chat-template: not allowed with argument --raw; {HELP}"
    ),
    ("/nowhere",): "/nowhere: ",
    ("MODEL", "--step", "1"): "MODEL: holds one model, without steps; expected no --step and no --steps",
    ("HISTORY", "--step", "1"): "HISTORY: has no step 1; expected one of 300000, 390000",
    ("HISTORY", "--steps", "300000,1"): "HISTORY: has no step 1; expected one of 300000, 390000",
    ("HISTORY", "--steps", "1,1"): "command line: argument --steps: expected different numbers with commas",
    ("MODEL", "--prompts", "/nowhere.txt"): "/nowhere.txt: No such file or directory; expected a file of prompts",
    ("MODEL", "--temperature", "nan"): "standard input, line 1: temperature = nan: expected a number from 0 ",
    ("MODEL", "--top-p", "0"): "standard input, line 1: top_p = 0.0: expected a number above 0, at most 1",
    ("MODEL", "--max-new-tokens", "100000"): "standard input, line 1: max_new_tokens = 100000: expected 1 to ",
    ("MODEL", "--stop", ""): f"command line: argument --stop: expected some text; {HELP}",
}  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line(model, arguments):
    places = {"MODEL": str(model), "HISTORY": str(HISTORY)}
    line = refused(*(places.get(argument, argument) for argument in arguments))
    expected = MISTAKES[arguments]
    for name, place in places.items():
        expected = expected.replace(f"{name}:", f"{place}:")
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "temperature": "warm"}', "temperature = 'warm': expected a number from 0 (greedy) up"),
        ('{"prompt": "a", "max_new_tokens": 2.5}', "max_new_tokens = 2.5: expected"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias = {'x': 1}; expected numbers by token id"),
        ('{"prompt": "a", "logit_bias": {"99999": 1}}', "logit_bias = 99999: expected a token id"),
        ('{"prompt": "\\ud800"}', "prompt = '\\ud800': expected text, all of it Unicode"),
        ('{"ids": [1, 99999]}', "token of prompt = 99999: expected an id"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages[0].role = 'robot'; expected one of"),
        (json.dumps({"ids": [5] * 600}), "prompt = [5, 5, 5, 5, 5, 5, ...]: expected fewer tokens than the"),
    ],
)
def test_a_bad_line_is_named_and_what_was_made_is_kept(model, tmp_path, line, expected):
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    out.write_text("what was made\n")
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert refused(model, "--prompts", file, "--output", out).startswith(f"{file}, line 2: {expected}")
    assert out.read_text() == "what was made\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "p.jsonl"]


# On a terminal.


CHAT = "import runpy; runpy.run_module('cpmjax.sample', run_name='__main__', alter_sys=True)"


@pytest.mark.slow
def test_a_chat_on_a_terminal(model, tmp_path):
    file = tmp_path / "chat.json"
    flags = ("--max-new-tokens", "40", "--temperature", "0")
    with terminals.terminal(CHAT, model, *flags) as (process, wait, write):
        wait("Ctrl-D leaves")
        wait("> ")
        write("Hi\n")
        wait("Hi\r\n")
        wait("> ")
        write("/set temperature 7 7\n")
        wait("error: /set temperature 7 7: expected /set OPTION VALUE")
        wait("> ")
        write("/set max_new_tokens 30\n")
        wait("> ")
        write("Again\n")
        wait("Again\r\n")
        wait("> ")
        write(f"/save {file}\n")
        wait("> ")
        for before in ("", "Once more\n"):  # at the prompt; while it answers, or just after
            write(f"{before}\x03")
            time.sleep(0.5)  # the terminal drops what it holds at a Ctrl-C, perhaps the prompt that follows too
            write("/set\n")
            wait("max_new_tokens 30")
            wait("> ")
        write("/reset\n\n\x04")
        assert process.wait(60) == 0
    tokenizer = load_tokenizer(model)
    sampler = Sampler(load(model), tokenizer)
    turns = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    ids = [tokenizer.bos, *tokenizer.encode("<用户>Hi<AI>")]
    (sample,) = sampler([ids], max_new_tokens=40, temperature=0, stop=["<AI>", "<用户>"])
    assert turns[1]["content"] == sample.text
