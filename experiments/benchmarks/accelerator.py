"""MiniCPM-2B on the accelerators of this machine: tokens a second and MFU, beside the plan, and what limits it.

    python experiments/benchmarks/accelerator.py [--attention auto ...] [--rows 1 2 4] [--steps 10] [--trace FOLDER]

The published shape, bfloat16 products, rows of 4,096 tokens, AdamW, the whole training step of `cpmjax.train` on random
tokens, for each attention and number of rows a device that fits: seconds of a step (median, after two that do not
count), tokens a second, MFU = tokens/s x (6 N + causal attention) / bf16 peak (`cpmjax.model.flops`), memory, and the
same from the compiled program by the data sheet (`cpmjax.parallel.estimate`). Then attention alone, forward and
backward, every implementation that this device has. With --trace, a profiler's trace of two steps. One line of JSON a
measurement; less than ten minutes on one GPU, most of it compiling. --preset tunnel-9m tries it on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measured import sample, say

from cpmjax.model.dispatch import attention
from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.presets import PRESETS
from cpmjax.parallel import compiled
from cpmjax.parallel.chips import CHIPS, Chip, peak_flops
from cpmjax.parallel.costs import costs
from cpmjax.parallel.estimate import estimate
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.program import lower_step
from cpmjax.training.state import abstract_state, create_state
from cpmjax.training.step import Rates, batch_sharding

_EXPERIMENT = Path(__file__).parents[1] / "minicpm_2b.yaml"
_GOAL = 55.0  # per cent of MFU on one H200
_RATES = Rates(np.float32(0.01), np.float32(0.1))


def chip_here() -> Chip | None:
    kind = jax.devices()[0].device_kind
    found = [(name, chip) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)]
    return max(found, key=lambda item: len(item[0]))[1] if found else None


def measure_step(config: Config, steps: int, trace: Path | None) -> None:
    mesh = make_mesh(config.mesh)
    optimizer, by_row = make_optimizer(config.model, config.optimizer), batch_sharding(mesh, config)
    shape = (config.training.batch_size, config.data.sequence_length)
    name = f"{config.compute.attention} attention, {shape[0] // jax.device_count()} rows a device"
    with jax.set_mesh(mesh):
        abstract = abstract_state(config.model, optimizer, mesh)
        began = time.perf_counter()
        program = lower_step(config, optimizer, abstract, by_row).compile()
        say([sample(f"compile, {name}", "s", time.perf_counter() - began)])
        used, limit = compiled.memory(program), compiled.device_memory(jax.devices()[0])
        say([sample(f"memory planned, {name}", "GiB", used.total / 2**30)])
        if limit is not None and used.total > limit:
            print(f"{name}: {compiled.describe(used, limit)}; left out", file=sys.stderr)
            return
        state = create_state(config.model, optimizer, abstract, seed=0)
        draw = np.random.default_rng(0)
        tokens = draw.integers(1, config.model.vocabulary, shape).astype(np.int32)
        places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        segments = 1 + places // (shape[1] // 2)  # two documents a row
        values = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "positions": places, "segments": segments}
        batch = jax.device_put(values | {"weights": np.ones(shape, np.float32)}, by_row)
        seconds = []
        for number in range(steps + 2):
            tracing = trace is not None and number == steps
            if tracing:
                jax.profiler.start_trace(str(trace))
            began = time.perf_counter()
            state, metrics = program(state, batch, _RATES)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
            if trace is not None and number == steps + 1:
                jax.profiler.stop_trace()
    assert np.isfinite(float(metrics["loss"]))
    step = statistics.median(seconds[2:])
    per_token = training_flops_per_token(config.model, shape[1])
    peak = peak_flops(jax.devices()[0])[0] * jax.device_count()
    rate = shape[0] * shape[1] / step
    say(
        [
            sample(f"step, {name}", "s", step),
            sample(f"throughput, {name}", "tokens/s", rate),
            sample(f"MFU, {name}", "%", 100 * rate * per_token / peak, floor=_GOAL),
        ]
    )
    in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if in_use is not None:
        say([sample(f"memory at its peak, {name}", "GiB", in_use / 2**30)])
    if (chip := chip_here()) is not None:
        guess = estimate(costs(program, mesh), chip, set())
        say(
            [
                sample(f"step planned at best, {name}", "s", guess.overlapped),
                sample(f"step planned one by one, {name}", "s", guess.in_turn),
            ]
        )


def measure_attention(config: Config, rows: int, steps: int) -> None:
    """Forward and backward of attention alone, two documents a row."""
    model, length = config.model, config.data.sequence_length
    draw = np.random.default_rng(0)

    def heads(count: int) -> jax.Array:
        return jnp.asarray(draw.normal(size=(rows, length, count, model.head)), config.compute.dtype)

    arrays = heads(model.heads), heads(model.kv), heads(model.kv)
    segments = jnp.asarray(np.tile(1 + np.arange(length) // (length // 2), (rows, 1)).astype(np.int32))
    for choice in ("chunked", "plain", "triton", "cudnn", "splash"):

        def loss(query, key, value, choice=choice):
            return jnp.sum(attention(choice, query, key, value, segments).astype(jnp.float32))

        try:
            program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()
            jax.block_until_ready(program(*arrays))
        except UserError as error:
            print(f"attention {choice}: {error}", file=sys.stderr)
            continue
        except jax.errors.JaxRuntimeError as error:  # out of memory, say
            print(f"attention {choice}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
            continue
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds.append(time.perf_counter() - began)
        say([sample(f"attention alone, {choice}, {rows} x {length}", "ms", 1e3 * statistics.median(seconds))])


def main(options: argparse.Namespace) -> None:
    config = cli.load([str(_EXPERIMENT), f"--model.preset={options.preset}"], PRESETS, "")
    config = replace(config, data=replace(config.data, sequence_length=options.length))
    for choice in options.attention:
        for rows in options.rows:
            training = replace(config.training, batch_size=rows * jax.device_count(), accumulation=1)
            compute = replace(config.compute, attention=choice)
            measure_step(replace(config, training=training, compute=compute), options.steps, options.trace)
    measure_attention(config, 1, options.steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minicpm-2b", choices=PRESETS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--attention", nargs="+", default=["auto"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="a device")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--trace", type=Path)
    main(parser.parse_args())
