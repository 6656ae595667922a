"""Tokens per second of the sampler beside Hugging Face transformers and llama.cpp: same weights, machine and minutes.

    python experiments/benchmarks/decoding.py FOLDER [--rounds 3] [--shapes 40m 300m] [--batches 1 32] [--new 128] \
        [--sampling 40m minicpm-2b]

Random weights that bfloat16 holds exactly (so float16 and float32 do), prompts of 128 random tokens, greedy, no token
ends a text. FOLDER keeps the models: the same one as a Hugging Face folder in float32 and in bfloat16, folded into a
Llama for transformers (float32, static cache), and as a GGUF file of float16 for llama.cpp (the wheel xllamacpp). A
peer that is not installed is left out. Each engine is a process of its own that stays for all rounds, with as many
threads as there are cores; in a round they take turns. Of a generation of 128 tokens and one of 1 the difference is
the time of the other 127: "decode". The bandwidth limit is the bytes of weights and of the cache that a token must
read, over the best rate at which XLA sums up a large array in the same round.

Then the sampler alone: how long a process takes to its first token, with an empty compilation cache and a filled one;
and which part of a step is sampling, with the chat's options, at 40 M and at the shape of MiniCPM-2B (all layers share
one layer's arrays here: as much is read, less is stored). One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from measured import sample, say

from cpmjax.data.corpora import documents
from cpmjax.data.tokenizer import Tokenizer, train
from cpmjax.formats.exporting import export_gguf, export_huggingface, export_llama
from cpmjax.formats.loading import Stored, load
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, specs
from cpmjax.model.presets import PRESETS
from cpmjax.model.transformer import MiniCPM
from cpmjax.model.weights import BFLOAT16, FLOAT16, FLOAT32, Weights, cast
from cpmjax.parallel.compiled import keep_compiled
from cpmjax.run.config import ModelConfig
from cpmjax.run.sources import StandardLibrary
from cpmjax.sampling.chat import RELEASED_OPTIONS

VOCABULARY, PROMPT = 4096, 128
SHAPES = {
    "40m": {"width": 640, "layers": 8, "heads": 10, "feed_forward": 1600},
    "300m": {"width": 1024, "layers": 24, "heads": 16, "feed_forward": 2560},
    "tiny": {"width": 64, "layers": 2, "heads": 2, "feed_forward": 128},
}
ENGINES = ("cpmjax float32", "cpmjax bfloat16", "transformers float32", "llama.cpp f16")
PEERS = {"transformers float32": "torch", "llama.cpp f16": "xllamacpp"}
THREADS = os.cpu_count() or 1
PATIENCE = 600.0  # seconds


def shape(name: str) -> ModelConfig:
    return ModelConfig(vocabulary=VOCABULARY, dim_model_base=256, context=4096, **SHAPES[name])


# The same model for everyone.


def make(folder: Path, name: str) -> None:
    """FOLDER/NAME with the model of each engine."""
    import jax

    if (folder / name).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = shape(name)
    tree = jax.tree.map(np.asarray, jax.jit(initialise, static_argnums=0)(config, jax.random.key(0)))

    def read(path: str, layer: int | None) -> np.ndarray:
        *outer, leaf = path.split("/")
        found = tree[outer[0]][leaf] if outer else tree[leaf]
        return (found if layer is None else found[layer]).astype(BFLOAT16)

    tokenizer = Tokenizer(train((each.text for each in islice(documents(StandardLibrary()), 400)), VOCABULARY, 2**22))
    rounded = Weights(config, dict.fromkeys(flat(specs(config)), BFLOAT16), read)
    partial = Path(tempfile.mkdtemp(dir=folder))
    for engine, dtype in zip(ENGINES, (FLOAT32, BFLOAT16, FLOAT32, FLOAT16), strict=True):
        stored = Stored(cast(rounded, dtype), tokenizer)
        target = partial / engine
        if engine == "transformers float32":
            export_llama(stored, target)
        elif engine == "llama.cpp f16":
            export_gguf(stored, target)
        else:
            export_huggingface(stored, target)
    os.replace(partial, folder / name)


# Engines: a function from (prompts, number of new tokens) to nothing.

Generate = Callable[[list[list[int]], int], None]


def cpmjax_engine(path: Path, batch: int, context: int) -> Generate:
    from cpmjax import Sampler

    sampler = Sampler(load(path))

    def generate(prompts: list[list[int]], new: int) -> None:
        samples = sampler(prompts, max_new_tokens=new, temperature=0, stop_ids=())
        assert all(len(sample.tokens) == new for sample in samples)

    return generate


def transformers_engine(path: Path, batch: int, context: int) -> Generate:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **settings)
        assert found.shape[1] == ids.shape[1] + new

    return generate


def llama_cpp_engine(path: Path, batch: int, context: int) -> Generate:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = batch * context
    settings.n_parallel = batch
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    settings.verbosity = -1
    server = xllamacpp.Server(settings)

    def ask(prompt: list[int], new: int) -> None:
        question = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        body = json.dumps(question).encode()
        request = urllib.request.Request(
            server.listening_address + "/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["tokens_predicted"] == new

    def generate(prompts: list[list[int]], new: int) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(ask, prompts, [new] * len(prompts)))

    return generate


def serve(engine: str, path: Path, batch: int, new: int, pipe: Connection) -> None:
    """Runs in a process of its own: answers "first" and "all" with the seconds of a generation."""
    make_engine = {"transformers": transformers_engine, "llama.cpp": llama_cpp_engine, "cpmjax": cpmjax_engine}
    generate = make_engine[engine.split()[0]](path, batch, PROMPT + new)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (batch, PROMPT)).tolist()
    for asked in iter(pipe.recv, None):
        if asked == "bandwidth":
            pipe.send(read_bandwidth())
            continue
        began = time.perf_counter()
        generate(prompts, 1 if asked == "first" else new)
        pipe.send(time.perf_counter() - began)


def read_bandwidth() -> float:
    """Bytes per second at which a large array can be read: the best of several sums."""
    import jax
    import jax.numpy as jnp

    best = np.inf
    for columns in (16, 64, 1024):
        x = jnp.ones((2**27 // columns, columns), jnp.float32)
        total = jax.jit(lambda x: jnp.sum(x, axis=0))
        jax.block_until_ready(total(x))
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(total(x))
            best = min(best, time.perf_counter() - began)
    return x.nbytes / best


@contextlib.contextmanager
def engines(folder: Path, batch: int, new: int) -> Iterator[dict[str, Callable[[str], float]]]:
    """Those that are installed, each a function that has it generate and returns the seconds."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for engine in ENGINES:
        if engine in PEERS and find_spec(PEERS[engine]) is None:
            continue
        pipes[engine], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(engine, folder / engine, batch, new, theirs), daemon=True))
        processes[-1].start()
        theirs.close()

    def ask(pipe: Connection, what: str) -> float:
        pipe.send(what)
        if not pipe.poll(PATIENCE):
            raise TimeoutError(f"an engine took more than {PATIENCE} s; expected the end of a generation")
        return pipe.recv()

    try:
        yield {engine: lambda what, pipe=pipe: ask(pipe, what) for engine, pipe in pipes.items()}
    finally:
        for process in processes:
            process.kill()
            process.join()


# What is measured.


def measure(folder: Path, name: str, batch: int, rounds: int, new: int) -> Iterator[dict[str, Any]]:
    """All engines on one shape and one batch size, by turns."""
    config, about = shape(name), f"{name.upper()}, batch {batch}"
    with engines(folder / name, batch, new) as asked:
        for engine, ask in asked.items():
            first, whole = ask("first"), ask("all")  # compiles, and warms up
            if engine.startswith("cpmjax"):
                again = ask("first") + ask("all")
                yield sample(f"{engine}, {about}: compilation", "s", first + whole - again)
        for _ in range(rounds):
            decode = {}
            bandwidth = asked["cpmjax float32"]("bandwidth")
            yield sample(f"read bandwidth, {about}", "GB/s", bandwidth / 1e9)
            for engine, ask in asked.items():
                first, whole = ask("first"), ask("all")
                decode[engine] = batch * (new - 1) / (whole - first)
                yield sample(f"{engine}, {about}: first token", "s", first)
                yield sample(f"{engine}, {about}: prompt and {new} tokens", "tokens/s", batch * new / whole)
                yield sample(f"{engine}, {about}: decode", "tokens/s", decode[engine])
            for engine, bytes_each in (("cpmjax float32", 4), ("cpmjax bfloat16", 2 if batch <= 4 else 4)):
                steps = decode[engine] / batch
                share = 100 * steps * step_bytes(config, bytes_each, batch, new) / bandwidth
                floor = 70 if (engine, name, batch) == ("cpmjax float32", "300m", 1) else None
                yield sample(f"{engine}, {about}: share of the bandwidth limit", "%", share, floor=floor)
            for peer in PEERS.keys() & decode.keys():
                for engine in ("cpmjax float32", "cpmjax bfloat16"):
                    bars = {("40m", 1): 1.7, ("300m", 1): 1.3}
                    floor = bars.get((name, batch), 1.0) if peer.startswith("transformers") else None
                    ratio = decode[engine] / decode[peer]
                    yield sample(f"{engine} / {peer}, {about}: decode", "", ratio, floor=floor)


def step_bytes(config: ModelConfig, bytes_each: int, batch: int, new: int) -> float:
    """Bytes that a step must read: the matrices, and half way through the tokens the float32 keys and values."""
    layer = 2 * config.width * (config.heads + config.kv) * config.head + 3 * config.width * config.feed_forward
    weights = (config.layers * layer + config.vocabulary * config.width) * bytes_each
    return weights + batch * (PROMPT + new / 2) * 2 * config.layers * config.kv * config.head * 4


def measure_starts(folder: Path, name: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A new process that loads a model and streams a text, with an empty compilation cache and with a filled one."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, str(folder), "--start", name, "--cache", cache]
            seconds = []
            for kind in ("empty", "filled"):
                began = time.perf_counter()
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                whole, first = time.perf_counter() - began, float(done.stdout)
                seconds.append(first)
                yield sample(f"{name.upper()}: model in memory to first token, {kind} compilation cache", "s", first)
                yield sample(f"{name.upper()}: start of the process to its end, {kind} cache", "s", whole)
        share = 100 * seconds[1] / seconds[0]
        yield sample(f"{name.upper()}: model in memory to first token, filled / empty cache", "%", share, bar=33.3)


def start(folder: Path, name: str, cache: Path) -> None:
    """Prints the seconds from a model in memory to the first tokens of a stream."""
    import jax

    from cpmjax import Sampler, load_tokenizer

    keep_compiled(cache)
    path = folder / name / "cpmjax bfloat16"
    model, tokenizer = load(path), load_tokenizer(path)
    jax.block_until_ready(model.parameters)
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, PROMPT).tolist()
    began = time.perf_counter()
    next(Sampler(model, tokenizer).stream(prompt, max_new_tokens=128, stop_ids=()))
    print(time.perf_counter() - began)


def measure_sampling(shapes: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    """What `adjust`, `choose` and the log-probability take of a whole step, one row, with the options of the chat."""
    import jax
    import jax.numpy as jnp

    from cpmjax.sampling.decode import Request, decode, prefill
    from cpmjax.sampling.logits import adjust, choose, log_probabilities
    from cpmjax.sampling.options import make_options
    from cpmjax.sampling.weights import decode_weights

    steps = 16

    @jax.jit
    def only_sampling(logits_BV: jax.Array, options: Any, prompt_BV: jax.Array, counts_BV: jax.Array) -> jax.Array:
        def body(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            logits_BV, total = carry
            token_B = choose(adjust(logits_BV, options, prompt_BV, counts_BV), options, step[None])
            # The next logits hang on this token, as they do in a model.
            return logits_BV.at[0, token_B].add(-1.0), total + log_probabilities(logits_BV, token_B)[0]

        return jax.lax.fori_loop(0, steps, body, (logits_BV, jnp.float32(0)))[1]

    for name in shapes:
        config = ModelConfig(**PRESETS[name]) if name in PRESETS else shape(name)
        one = replace(config, layers=1)
        parameters = jax.jit(initialise, static_argnums=0)(one, jax.random.key(0))
        parameters = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters)
        weights = decode_weights(MiniCPM(one, parameters))
        weights = weights._replace(layers=weights.layers * config.layers)
        options = make_options(1, config.vocabulary, **RELEASED_OPTIONS)
        request = Request(options, jnp.full((1, 1), -1), jnp.full(1, steps))
        arguments = (np.ones((1, PROMPT), np.int32), np.full(1, PROMPT, np.int32))

        def state(config: ModelConfig = config, weights: Any = weights, arguments: Any = arguments) -> Any:
            found = prefill(config, weights, *arguments, new_tokens=steps, cache_dtype="float32")[0]
            return jax.block_until_ready(found)

        logits_BV = 3 * jax.random.normal(jax.random.key(1), (1, config.vocabulary))
        prompt_BV, counts_BV = state().prompt_BV, state().counts_BV
        for number in range(rounds + 1):
            before = state()
            began = time.perf_counter()
            jax.block_until_ready(decode(config, weights, before, request, np.int32(steps)))
            middle = time.perf_counter()
            jax.block_until_ready(only_sampling(logits_BV, options, prompt_BV, counts_BV))
            sampling, step = (time.perf_counter() - middle) / steps, (middle - began) / steps
            if number:  # the first compiles
                yield sample(f"{name.upper()}, batch 1, bfloat16: step", "ms", 1e3 * step)
                yield sample(f"{name.upper()}: sampling of a token", "ms", 1e3 * sampling)
                bar = 5.0 if name in PRESETS else None
                yield sample(f"{name.upper()}: sampling, share of a step", "%", 100 * sampling / step, bar=bar)


def main(arguments: argparse.Namespace) -> None:
    for name in arguments.shapes:
        make(arguments.folder, name)
        for batch in arguments.batches:
            say(measure(arguments.folder, name, batch, arguments.rounds, arguments.new))
        say(measure_starts(arguments.folder, name, arguments.rounds))
    say(measure_sampling(arguments.sampling, arguments.rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["40m", "300m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--sampling", nargs="+", choices=[*SHAPES, *PRESETS], default=["40m", "minicpm-2b"])
    parser.add_argument("--start", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(options.folder, options.start, options.cache)
    else:
        main(options)
