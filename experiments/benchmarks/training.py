"""Tokens per second of a training step beside PyTorch and levanter: same shape, batch, precision, machine and minutes.

    python experiments/benchmarks/training.py [--rounds 3] [--steps 4] [--shapes 10m 40m] [--batches 2 8]
        [--levanter PYTHON]

Rows of 512 random tokens, float32, AdamW, gradients clipped to a norm of 1, tied embeddings: what the training job
compiles, with the metrics it logs; a LlamaForCausalLM of transformers, eager and compiled by torch; levanter's
LlamaLMHeadModel as its configuration comes. A peer that is not installed is left out; levanter's requirements exclude
those of transformers, so it may live in an environment of its own, whose PYTHON is named. "huge pages" is cpmjax with
the GLIBC_TUNABLES below, which have glibc ask Linux for pages of 2 MiB.

Each engine is a process of its own that stays for all rounds, with as many threads as there are cores; in a round they
take turns, and the fastest of so many steps counts. Memory is the most that the process ever held: libraries and
compilation too. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
from measured import sample, say

VOCABULARY, LENGTH, LAYERS = 4096, 512, 8
SHAPES = {
    "10m": {"width": 320, "heads": 5, "feed_forward": 800},
    "40m": {"width": 640, "heads": 10, "feed_forward": 1600},
    "tiny": {"width": 64, "heads": 1, "feed_forward": 160},
}
OURS = ("cpmjax", "cpmjax huge pages")
PEERS = {
    "torch eager": ("torch", "transformers"),
    "torch compiled": ("torch", "transformers"),
    "levanter": ("levanter",),
}
FLOORS = {"torch eager": 1.0, "levanter": 1.25}  # of our tokens per second in theirs
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=68719476736:glibc.malloc.trim_threshold=68719476736"
THREADS = os.cpu_count() or 1

Step = Callable[[], None]  # returns when the step is done


def tokens(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (batch, LENGTH + 1), dtype=np.int32)


# Engines.


def cpmjax_engine(shape: dict[str, int], batch: int) -> Step:
    import jax

    from cpmjax.model.mup import per_step
    from cpmjax.parallel.mesh import make_mesh
    from cpmjax.parallel.sharding import named_sharding
    from cpmjax.run.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
    from cpmjax.training.optimizer import make_optimizer
    from cpmjax.training.state import abstract_state, create_state
    from cpmjax.training.step import Rates, make_step, next_token_loss

    model = ModelConfig(vocabulary=VOCABULARY, layers=LAYERS, dim_model_base=256, **shape)
    config = Config(
        model=model, data=DataConfig(sequence_length=LENGTH), training=TrainingConfig(batch_size=batch, accumulation=1)
    )
    optimizer, mesh = make_optimizer(model, config.optimizer), make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(model, optimizer, mesh)
    rates = Rates(*np.float32(per_step(config.optimizer, 1.0)))
    ids, whole = tokens(batch), np.ones((batch, LENGTH))
    arrays = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (batch, 1)),
        "segments": whole.astype(np.int32),
        "weights": whole.astype(np.float32),
    }
    place = named_sharding(mesh, ("rows", "length"), ids[:, 1:].shape, "batch")
    rows = {name: jax.device_put(array, place) for name, array in arrays.items()}
    with jax.set_mesh(mesh):
        function = make_step(model, next_token_loss(model, config.compute, 0.0), optimizer, accumulation=1)
        compiled = jax.jit(function, donate_argnums=0).lower(abstract, rows, rates).compile()
        state = create_state(model, optimizer, abstract, 0)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, rows, rates)
        jax.block_until_ready((state, metrics))

    return step


def torch_engine(shape: dict[str, int], batch: int, compiled: bool) -> Step:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape["width"],
        intermediate_size=shape["feed_forward"],
        num_hidden_layers=LAYERS,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001, weight_decay=0.1)
    ids = torch.tensor(tokens(batch)[:, :-1], dtype=torch.long)
    forward: Any = torch.compile(model) if compiled else model

    def step() -> None:
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def levanter_engine(shape: dict[str, int], batch: int) -> Step:
    import equinox as eqx
    import haliax as hax
    import jax
    import optax
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample

    config = LlamaConfig(
        max_seq_len=LENGTH,
        hidden_dim=shape["width"],
        intermediate_dim=shape["feed_forward"],
        num_layers=LAYERS,
        num_heads=shape["heads"],
        num_kv_heads=shape["heads"],
        tie_word_embeddings=True,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.001, weight_decay=0.1))
    rows, places = hax.Axis("batch", batch), hax.Axis("position", LENGTH)

    def update(ids, model, moments):
        def loss(model):
            example = LmExample(tokens=ids, loss_weight=LmExample.causal_loss_mask(places).astype(np.float32))
            return model.compute_next_token_loss(example).scalar()

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, moments = optimizer.update(gradient, moments, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), moments, value

    mesh = jax.make_mesh((1, 1, 1), ("replica_dcn", "replica", "data"), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = eqx.filter_jit(config.model_type.init)(hax.Axis("vocab", VOCABULARY), config, key=jax.random.key(0))
        moments = eqx.filter_jit(optimizer.init)(eqx.filter(model, eqx.is_inexact_array))
    jitted = eqx.filter_jit(update, donate="all-except-first")
    ids = hax.named(tokens(batch)[:, :-1], (rows, places))

    def step() -> None:
        nonlocal model, moments
        with jax.set_mesh(mesh):
            model, moments, value = jitted(ids, model, moments)
        jax.block_until_ready(value)

    return step


def serve(engine: str, shape: str, batch: int) -> None:
    """For each line that says how many steps: the seconds of the fastest, and the most memory held so far, in bytes."""
    make: dict[str, Callable[[], Step]] = {
        "cpmjax": lambda: cpmjax_engine(SHAPES[shape], batch),
        "torch": lambda: torch_engine(SHAPES[shape], batch, compiled=engine.endswith("compiled")),
        "levanter": lambda: levanter_engine(SHAPES[shape], batch),
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    step = make[engine.split()[0]]()
    for line in sys.stdin:
        fastest = float("inf")
        for _ in range(int(line)):
            began = time.perf_counter()
            step()
            fastest = min(fastest, time.perf_counter() - began)
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps((fastest, held)), file=answers, flush=True)


def installed(engine: str, levanter: str) -> bool:
    elsewhere = engine == "levanter" and levanter != sys.executable
    return elsewhere or all(find_spec(module) for module in PEERS.get(engine, ()))


@contextlib.contextmanager
def engines(shape: str, batch: int, levanter: str) -> Iterator[dict[str, Callable[[int], tuple[float, float]]]]:
    """Those that are installed, each a function from a number of steps to (seconds of the fastest, bytes held).

    A process starts when it is asked for the first time.
    """
    processes: dict[str, subprocess.Popen[str]] = {}

    def start(engine: str) -> None:
        python = levanter if engine == "levanter" else sys.executable
        environment = os.environ | ({"GLIBC_TUNABLES": HUGE_PAGES} if engine.endswith("huge pages") else {})
        command = [python, __file__, "--serve", engine, "--shapes", shape, "--batches", str(batch)]
        processes[engine] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(engine: str, steps: int) -> tuple[float, float]:
        if engine not in processes:
            start(engine)
        process = processes[engine]
        assert process.stdin is not None and process.stdout is not None
        print(steps, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{engine}: ended with exit code {process.wait()}; expected {steps} steps, see above")
        seconds, held = json.loads(answer)
        return seconds, held

    try:
        there = [each for each in (*OURS, *PEERS) if installed(each, levanter)]
        yield {engine: lambda steps, engine=engine: ask(engine, steps) for engine in there}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def measure(shape: str, batch: int, rounds: int, steps: int, levanter: str) -> Iterator[dict[str, Any]]:
    """All engines on one shape and one batch size, by turns; what they compile, they have compiled before."""
    about = f"{shape.upper()}, batch {batch} x {LENGTH}"
    with engines(shape, batch, levanter) as asked:
        for engine, ask in asked.items():
            began = time.perf_counter()
            ask(1)
            yield sample(f"{engine}, {about}: start to first step", "s", time.perf_counter() - began)
            ask(1)
        for _ in range(rounds):
            speed, held = {}, {}
            for engine, ask in asked.items():
                seconds, held[engine] = ask(steps)
                speed[engine] = batch * LENGTH / seconds
                yield sample(f"{engine}, {about}: training", "tokens/s", speed[engine])
                yield sample(f"{engine}, {about}: memory", "GB", held[engine] / 1e9)
            for peer in (each for each in PEERS if each in speed):
                for engine in OURS:
                    ratio = speed[engine] / speed[peer]
                    yield sample(f"{engine} / {peer}, {about}: training", "", ratio, floor=FLOORS.get(peer))
            if "torch eager" in speed:
                ratio = held["cpmjax"] / held["torch eager"]
                yield sample(f"cpmjax / torch eager, {about}: memory", "", ratio, bar=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of an engine in a round")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["10m", "40m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--levanter", default=sys.executable, help="a Python that has levanter")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.shapes[0], arguments.batches[0])
        return
    for shape in arguments.shapes:
        for batch in arguments.batches:
            say(measure(shape, batch, arguments.rounds, arguments.steps, arguments.levanter))


if __name__ == "__main__":
    main()
