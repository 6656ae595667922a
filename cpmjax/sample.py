"""Prompts in, text out: a file of prompts, a pipe, or a conversation.

usage: python -m cpmjax.sample MODEL [--prompts FILE.txt|FILE.jsonl|-] [--output FILE.jsonl]
                               [--step N | --steps LIST|all] [--average] [--max-new-tokens 64] [--n 1]
                               [--temperature 1] [--top-k K] [--top-p P] [--min-p P] [--typical-p P]
                               [--repetition-penalty R] [--presence-penalty A] [--frequency-penalty A]
                               [--seed 0] [--stop TEXT]... [--logprobs K] [--cache-dtype compute|float32|int8]
                               [--batch N] [--chat-template | --raw]

MODEL is a run directory, a Hugging Face folder or a GGUF file, recognised by its content. Of a run the newest
checkpoint is taken; --steps all samples the same prompts from every one, --average from the averages of parameters that
a run kept (training.ema, schedule-free AdamW).

Prompts: a .txt file holds one a line, as it stands (a backslash is a backslash). A line of a .jsonl file is an object
with "prompt" (text), "messages" (a conversation, [{"role": "user", "content": "..."}]) or "ids" (token ids), and
perhaps an "id" that its samples carry too, and options that replace the flags for this line, named like them
({"prompt": "Once", "temperature": 0.7, "stop": ["."]}), or "logit_bias", by token id ({"17": -1.5}). With "-", or
where standard input is no terminal, prompts are read from there: .jsonl if the first line is a JSON object, else text.
Text is continued; with --chat-template it is what a user says. Messages always go through the template.

Samples: one JSON object a line, in the order of the prompts: index (of the prompt, from 0), prompt, text, tokens,
finish_reason (stop or length); step, of a run; sample, with --n; logprobs and top_logprobs, if asked. They go to
--output, or to standard output. A sample depends on its prompt, its options and its seed alone. After a kill, Ctrl-C
or SIGTERM the same command goes on where the file ends; FILE.origin.json beside it keeps other commands out. After
the first signal the batch at work is finished and the exit code is 75; a second one ends at once.

A batch is 32 rows on a CPU and 256 elsewhere, which run at a time where a quarter of the device's memory holds them.
With --batch as many rows as it says run at a time, whether the memory holds them or not.

On a terminal and without --prompts it is a chat; /help says what can be typed. A model without a chat template, or
with --raw, continues the text.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
from tqdm import tqdm

from cpmjax.data.template import Template
from cpmjax.formats.history import find_steps
from cpmjax.formats.loading import Reading, Stored, files_below, load, open_stored, recognise, run_steps
from cpmjax.model.weights import Weights, checksum
from cpmjax.parallel.compiled import keep_compiled
from cpmjax.run import cli
from cpmjax.run.config import RunConfig
from cpmjax.run.directory import json_line
from cpmjax.run.errors import UserError
from cpmjax.run.interrupt import SAVED_AND_STOPPED, StopRequest
from cpmjax.sampling.chat import RELEASED_OPTIONS, Chat
from cpmjax.sampling.promptfile import Request, batches, continued, digest, read_prompts, remaining
from cpmjax.sampling.request import check
from cpmjax.sampling.sampler import MOST_ROWS, CacheDtype, Sample, Sampler
from cpmjax.sampling.terminal import Conversation, Text, converse

_ROWS_ON_CPU = 32  # more keep the first lines waiting
_SECONDS_BETWEEN_LINES = 10.0


class Option(NamedTuple):
    kind: type[int] | type[float]
    default: Any
    help: str


# What every row of a batch has its own of; the names and defaults are those of cpmjax.Sampler.
OPTIONS = {
    "max_new_tokens": Option(int, 64, "where a sample ends at the latest (64; 512 in a chat)"),
    "temperature": Option(float, 1.0, "0 takes the likeliest token (1; 0.3 in a chat, with --top-p 0.8)"),
    "top_k": Option(int, 0, "only the K likeliest tokens (0: all)"),
    "top_p": Option(float, 1.0, "only the likeliest tokens that make up this probability (1: all)"),
    "min_p": Option(float, 0.0, "only tokens of this share of the likeliest one's probability (0: all)"),
    "typical_p": Option(float, 1.0, "only the most typical tokens that make up this probability (1: all)"),
    "repetition_penalty": Option(float, 1.0, "divides the logits of tokens that were there before (1: none)"),
    "presence_penalty": Option(float, 0.0, "is taken off the logits of tokens generated before (0: none)"),
    "frequency_penalty": Option(float, 0.0, "the same for each time they were generated (0: none)"),
    "seed": Option(int, 0, "of what is drawn; sample i of a prompt has this seed + i (0)"),
}
_MORE = ("logit_bias", "n", "stop")  # what a line of .jsonl may have its own of, too
_CHAT_TOKENS = 512


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        keep_compiled(RunConfig().cache)
    if arguments.prompts is None and sys.stdin.isatty():
        return chat(arguments)
    try:
        return sample(arguments)
    except BrokenPipeError:  # whoever reads the lines has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# A conversation.


def chat(arguments: argparse.Namespace) -> int:
    """A chat on the terminal, or a text that the model continues."""
    for flag in ("output", "steps", "n", "logprobs", "batch"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag}: expected --prompts with it; without, this is a conversation")
    path = Path(arguments.model).expanduser()
    (step,) = _steps(path, arguments)
    stored = open_stored(path, step, Reading(average=arguments.average))
    tokenizer, context = stored.tokenizer, stored.weights.config.context
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer; expected one, or --prompts FILE.jsonl with token ids")
    options: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()}
    conversation: Conversation
    if arguments.chat_template or (tokenizer.chat_template and not arguments.raw):
        options |= RELEASED_OPTIONS | {"max_new_tokens": min(_CHAT_TOKENS, max(1, context // 2))}
        conversation = Chat(tokenizer, context, _CHAT_TOKENS)
    else:
        conversation = Text(tokenizer, context, OPTIONS["max_new_tokens"].default)
    options |= _given(arguments)
    check(stored.weights.config, tokenizer, ["a"], options["max_new_tokens"], None, _of_sampling(options))
    sampler = Sampler(load(path, step, average=arguments.average), tokenizer, cache_dtype=arguments.cache_dtype)
    converse(sampler, conversation, options, arguments.stop)
    return 0


# A batch.


def sample(arguments: argparse.Namespace) -> int:
    """Samples all prompts from every step and writes a line for each sample; returns the exit code."""
    path = Path(arguments.model).expanduser()
    steps = _steps(path, arguments)
    reading = Reading(average=arguments.average)
    stored = open_stored(path, steps[0], reading)
    for step in steps[1:] if arguments.average else ():
        open_stored(path, step, reading)  # a checkpoint without one shows before the first sample
    requests = _requests(arguments, stored)
    per_step = sum(request.n for request in requests)
    total = per_step * len(steps)
    rows = arguments.batch or (_ROWS_ON_CPU if jax.default_backend() == "cpu" else MOST_ROWS)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        write: Callable[[dict[str, Any]], None] = _print
        done, where = 0, "standard output"
        if arguments.output is not None:
            where = arguments.output
            places = (
                _place(step, request, number) for step in steps for request in requests for number in range(request.n)
            )
            origin = _origin(arguments, stored, requests)
            lines, done = stack.enter_context(continued(Path(where).expanduser(), origin, places))
            write = lines.append
        progress = stack.enter_context(contextlib.closing(Progress(total, done)))
        for step in steps[done // per_step :]:
            # Of all steps the shapes are the same, and weights are arguments of what was compiled for the first.
            model = load(path, step, average=arguments.average)
            sampler = Sampler(model, stored.tokenizer, cache_dtype=arguments.cache_dtype, max_batch=arguments.batch)
            for batch in batches(remaining(requests, done % per_step), rows):
                for request, number, each in _call(sampler, batch, arguments.logprobs):
                    write(_record(step, request, number, each, arguments.logprobs))
                    progress.add(len(each.tokens))
                    done += 1
                if stop.received is not None and done < total:
                    progress.close()
                    goes_on = "; the same command goes on from there" if arguments.output is not None else ""
                    _say(f"{stop.received}: {done} of {total} samples are in {where}{goes_on}")
                    return SAVED_AND_STOPPED
    _say(f"{where}: {done} of {total} samples; {progress.summary}")
    return 0


def _call(
    sampler: Sampler, batch: Sequence[tuple[Request, int]], logprobs: int | None
) -> Iterator[tuple[Request, int, Sample]]:
    """The samples of one batch that are not there yet, each with its number among those of its prompt."""
    first, _ = batch[0]
    options: dict[str, Any] = {name: [request.options[name] for request, _ in batch] for name in first.options}
    prompts = [request.ids for request, _ in batch]
    samples = iter(sampler(prompts, n=first.n, stop=first.stop, logprobs=logprobs or 0, **options))
    for request, there in batch:
        for number in range(request.n):
            each = next(samples)
            if number >= there:
                yield request, number, each


# What is asked.


def _steps(path: Path, arguments: argparse.Namespace) -> Sequence[int | None]:
    """The checkpoints to sample from; None for a model that is the only one there."""
    kind = recognise(path)
    if kind not in ("run", "history"):
        if arguments.step is not None or arguments.steps is not None:
            raise UserError(f"{path}: holds one model, without steps; expected no --step and no --steps")
        return [None]
    there = run_steps(path) if kind == "run" else sorted(find_steps(files_below(path)))
    if arguments.steps == "all":
        return there
    asked: list[int] = arguments.steps or [there[-1] if arguments.step is None else arguments.step]
    for step in asked:
        if step not in there:
            raise UserError(f"{path}: has no step {step}; expected one of {', '.join(map(str, there))}")
    return asked


def _requests(arguments: argparse.Namespace, stored: Stored) -> list[Request]:
    """All prompts, checked before the first is sampled: a bad line shows at once and not after a night."""
    file = None if arguments.prompts in (None, "-") else Path(arguments.prompts).expanduser()
    prompts = read_prompts(file, sys.stdin.buffer, (*OPTIONS, *_MORE))
    config, tokenizer = stored.weights.config, stored.tokenizer
    defaults = {name: option.default for name, option in OPTIONS.items()} | _given(arguments) | {"logit_bias": {}}
    template = None
    if arguments.chat_template or any(prompt.is_conversation for prompt in prompts):
        if tokenizer is None:
            raise UserError(f"{arguments.model}: has no tokenizer; expected one for what goes through a chat template")
        template = Template(tokenizer)
    requests = []
    for index, prompt in enumerate(prompts):
        own = dict(prompt.options)
        n, stop = own.pop("n", arguments.n or 1), own.pop("stop", arguments.stop)
        options = defaults | own
        try:
            given: Any = prompt.given
            if template is not None and (
                prompt.is_conversation or (arguments.chat_template and isinstance(given, str))
            ):
                messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
                given, stop = template.encode(messages), [*stop, *template.stop]
            (ids,) = check(config, tokenizer, [given], options["max_new_tokens"], None, _of_sampling(options)).prompts
            requests.append(Request(index, prompt, ids, options, n, tuple(stop)))
        except UserError as error:
            raise UserError(f"{prompt.where}: {str(error).replace(' of row 0', '', 1)}") from error
    return requests


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that the command line names."""
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}


def _of_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "max_new_tokens"}


# What comes out.


def _place(step: int | None, request: Request, number: int) -> dict[str, int]:
    """What tells a sample from all others of an output."""
    place = {} if step is None else {"step": step}
    place["index"] = request.index
    return place | {"sample": number} if request.n > 1 else place


def _record(step: int | None, request: Request, number: int, sample: Sample, logprobs: int | None) -> dict[str, Any]:
    record: dict[str, Any] = dict(_place(step, request, number))
    if request.prompt.identity is not None:
        record["id"] = request.prompt.identity
    record |= {"prompt": request.prompt.given, "text": sample.text, "tokens": sample.tokens}
    record["finish_reason"] = sample.finish_reason
    if logprobs is not None:
        record["logprobs"] = sample.logprobs
    if logprobs:
        record["top_logprobs"] = sample.top_logprobs
    return record


def _origin(arguments: argparse.Namespace, stored: Stored, requests: Sequence[Request]) -> dict[str, Any]:
    """What the samples depend on beside the steps, which the lines name. How many run at a time is no part of it."""
    flags = ("stop", "logprobs", "cache_dtype", "chat_template")
    return {
        "weights": _checksum(stored.weights),
        "tokenizer": None if stored.tokenizer is None else stored.tokenizer.fingerprint,
        "prompts": digest([request.prompt for request in requests]),
        **{name: option.default for name, option in OPTIONS.items()},
        **_given(arguments),
        "n": arguments.n or 1,
        **{name: getattr(arguments, name) for name in flags},
    }


def _checksum(weights: Weights) -> int:
    return functools.reduce(lambda before, at: checksum(weights.read(*at), before), weights.slices(), 0)


def _print(record: dict[str, Any]) -> None:
    tqdm.write(json_line(record, sys.stdout.encoding or "utf-8"), file=sys.stdout)
    sys.stdout.flush()


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit=" samples", disable=not sys.stderr.isatty())
        self._began = self._said = time.monotonic()
        self._total, self._done, self._tokens = total, done, 0

    def add(self, tokens: int) -> None:
        """One more sample, of so many tokens."""
        self._done += 1
        self._tokens += tokens
        self._bar.set_postfix_str(self.summary, refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            _say(f"{self._done} of {self._total} samples; {self.summary}")

    @property
    def summary(self) -> str:
        seconds = time.monotonic() - self._began
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens per second"

    def close(self) -> None:
        self._bar.close()


# The command line.


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser.documented("python -m cpmjax.sample", __doc__)
    parser.add_argument("model", metavar="MODEL", help="a run directory, a Hugging Face folder or a GGUF file")
    parser.add_argument("--prompts", metavar="FILE", help=".txt or .jsonl; - for standard input")
    parser.add_argument("--output", metavar="FILE.jsonl", help="where samples go (standard output)")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--step", type=int, metavar="N", help="one checkpoint of a run (the newest)")
    steps.add_argument(
        "--steps", type=cli.step_list, metavar="LIST|all", help="several: numbers with commas between them"
    )
    parser.add_argument("--average", action="store_true", help="the average of a run's parameters, in their place")
    for name, option in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=option.kind, metavar="N" if option.kind is int else "X", help=option.help)
    parser.add_argument("--n", type=_positive, metavar="N", help="samples of each prompt (1)")
    parser.add_argument(
        "--stop",
        action="append",
        type=_some_text,
        default=[],
        metavar="TEXT",
        help="ends a sample; repeatable",
    )
    parser.add_argument(
        "--logprobs", type=_count, metavar="K", help="log-probabilities of tokens and of the K likeliest"
    )
    parser.add_argument("--cache-dtype", choices=get_args(CacheDtype), default="compute", help="of keys and values")
    parser.add_argument("--batch", type=_positive, metavar="N", help="rows that run at a time (see above)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--chat-template", action="store_true", help="a prompt of text is what a user says")
    form.add_argument("--raw", action="store_true", help="a prompt of text is continued, also on a terminal")
    return parser.parse_args(argv)


def _count(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _count(text, least=1)


def _some_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected some text")
    return text


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    cli.main(main)
