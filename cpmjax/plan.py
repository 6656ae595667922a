"""What a machine would do with an experiment, before it is paid for.

usage: python -m cpmjax.plan EXPERIMENT.yaml --topology NAME [--flag=value ...] [--section.key=value ...]

Compiles the real training step for a machine that is not here, and says what it takes of each device: memory by kind,
FLOPs, traffic and collectives, all with the turns of their loops, and how long a step takes at best by the data sheet
of the chip. NAME is a slice of TPUs (v4, v5e, v5p, v6e, as in v5e:4x4), whose compiler comes with libtpu (pip install
'cpmjax[tpu]'), or a host of GPUs (a100, h100, h200, rtx4090, as in h100:8) or of CPU devices (cpu:8), for which the
compiler of this machine stands in: memory and collectives are estimates then, and bfloat16 takes what float32 does.
With --sample it is not a training step but sampling. Nothing is written. The exit code is 1 if it does not fit.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.parameters import count
from cpmjax.model.presets import PRESETS
from cpmjax.parallel import compiled
from cpmjax.parallel.costs import Costs, costs
from cpmjax.parallel.estimate import Estimate, estimate, seconds
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.topologies import Topology, topology
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import aligned
from cpmjax.sampling.program import compile_sampling
from cpmjax.training import memory
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.padding import abstract_at_rest
from cpmjax.training.program import declared_state, lower_step
from cpmjax.training.step import abstract_batch, batch_sharding

GIB = 2**30


def main(argv: list[str]) -> int:
    parser = cli.Parser.documented("python -m cpmjax.plan", __doc__)
    parser.add_argument("--topology", required=True, help="the machine")
    parser.add_argument("--slices", type=int, default=1, help="so many of them, over a network (default: 1)")
    parser.add_argument(
        "--sample", help="ROWSxPROMPT+NEW: rows of prompts of so many tokens, with so many new ones each"
    )
    arguments, experiment = parser.parse_known_args(argv)
    shape = None if arguments.sample is None else sampling_shape(arguments.sample)
    config = cli.load(experiment, PRESETS, "")
    machine = topology(arguments.topology, arguments.slices)
    mesh = make_mesh(config.mesh, machine.devices)
    print(describe_machine(machine, mesh), flush=True)
    with jax.set_mesh(mesh):
        return plan_training(config, machine, mesh) if shape is None else plan_sampling(config, machine, mesh, *shape)


def sampling_shape(text: str) -> tuple[int, int, int]:
    """ROWSxPROMPT+NEW as numbers. Raises UserError for anything else."""
    form = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})\+([1-9]\d{0,6})", text)
    if form is None or int(form[2]) % 16:
        raise UserError(f"--sample = {text!r}: expected ROWSxPROMPT+NEW, as in 8x1024+128, the prompt a multiple of 16")
    return int(form[1]), int(form[2]), int(form[3])


class Step(NamedTuple):
    """What the training step of an experiment takes on a machine."""

    seconds: float  # to compile it
    used: compiled.Memory
    held: memory.Held
    costs: Costs
    remedies: list[tuple[str, float]]


def compile_step(config: Config, mesh: Mesh) -> Step:
    """Under `jax.set_mesh`. Raises UserError where the mesh does not divide what it splits."""
    by_row = batch_sharding(mesh, config)
    optimizer = make_optimizer(config.model, config.optimizer)
    abstract = declared_state(config, optimizer, mesh)
    began = time.perf_counter()
    program = lower_step(config, optimizer, abstract, by_row).compile()
    seconds = time.perf_counter() - began
    used = compiled.memory(program)
    held = memory.held(config, abstract, abstract_batch(config, by_row), used, mesh)
    return Step(seconds, used, held, costs(program, mesh), memory.remedies(config, abstract, held, mesh))


def plan_training(config: Config, machine: Topology, mesh: Mesh) -> int:
    """Prints what a training step takes; returns the exit code."""
    step, training = compile_step(config, mesh), config.training
    print(
        f"step         {training.batch_size} rows of {config.data.sequence_length} tokens, {training.accumulation} "
        f"micro-batches; {count(config.model):,} parameters; compiled in {step.seconds:.0f} s\n\n"
        f"{describe_memory(step.held, step.used)}\n\n{describe_costs(step.costs, machine, mesh)}\n"
    )
    if machine.chip is not None:
        tokens = training.batch_size * config.data.sequence_length
        guess = estimate(step.costs, machine.chip, machine.between_slices(mesh))
        per_token = training_flops_per_token(config.model, config.data.sequence_length)
        print(describe_speed(guess, "a step", tokens, per_token, machine.chip.flops * len(machine.devices)))
        print(f"MFU          by {per_token:.4g} FLOPs a token: 6 N and causal attention")
    return fits(step.used.total, machine, step.remedies)


def plan_sampling(config: Config, machine: Topology, mesh: Mesh, rows: int, prompt: int, new: int) -> int:
    """Prints what reading prompts and each new token takes; returns the exit code."""
    abstract = declared_state(config, make_optimizer(config.model, config.optimizer), mesh)
    parameters = abstract_at_rest(config.model, abstract.trainable)
    programs = compile_sampling(config, parameters, mesh, rows, prompt, new)
    most = 0
    for name, program, tokens in (
        ("for the prompts", programs.prefill, rows * prompt),
        ("for a token of each row", programs.decode, rows),
    ):
        used, found = compiled.memory(program), costs(program, mesh, turns=1)
        most = max(most, used.total)
        parts = ", ".join(f"{kind} {size / GIB:.3f}" for kind, size in zip(used._fields, used, strict=True))
        weights = memory.on_device(programs.weights) / GIB
        print(f"\n{name}: {used.total / GIB:.3f} GiB on each device ({parts}; {weights:.3f} of it weights)")
        print(describe_costs(found, machine, mesh))
        if machine.chip is not None:
            guess = estimate(found, machine.chip, machine.between_slices(mesh))
            print(describe_speed(guess, name, tokens))
    return fits(most, machine, [("fewer rows, a shorter prompt, or more devices on --mesh.tensor", 0.0)])


def fits(used: int, machine: Topology, remedies: list[tuple[str, float]]) -> int:
    """Prints whether it does, and what would help; returns the exit code."""
    if machine.chip is None:
        return 0
    missing = used - machine.chip.memory
    of = f"{used / GIB:.2f} of {machine.chip.memory / GIB:.2f} GiB"
    if missing <= 0:
        print(f"fits         {of}")
        return 0
    print(f"does not fit by {missing / GIB:.2f} GiB: {of}; try")
    for key, saved in remedies:
        print(f"  {key}" + (f"  (about {saved / GIB:.2f} GiB less)" if saved else ""))
    return 1


def describe_machine(machine: Topology, mesh: Mesh) -> str:
    device = machine.devices[0]
    kind = f"simulated on {device.device_kind}" if machine.simulated else device.device_kind
    slices = f" in {machine.slices} slices" if machine.slices > 1 else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    line = f"machine      {machine.name}, {len(machine.devices)} devices{slices} ({kind}); mesh {axes}"
    if machine.simulated and machine.chip is not None:
        line += "\n             by the compiler for CPUs: attention not fused, bfloat16 as float32; it takes less there"
    return line


def describe_memory(held: memory.Held, used: compiled.Memory) -> str:
    """A table of one device's."""
    sizes = {
        "parameters": held.parameters,
        "optimizer": held.optimizer,
        "average": held.average,
        "batch": held.batch,
        "temporary, at most": used.temporaries,
        "  gradients": held.gradients,
        "  activations kept for the backward pass": held.activations,
        "  rest": held.workspace,
        "outputs that reuse nothing": used.outputs,
        "all": used.total,
    }
    sizes["beside it on its host: optimizer"] = held.on_host
    rows = [("memory of each device", "GiB"), *((kind, f"{size / GIB:.3f}") for kind, size in sizes.items() if size)]
    return aligned(rows)


def describe_costs(found: Costs, machine: Topology, mesh: Mesh) -> str:
    """FLOPs, traffic, and a table of collectives."""
    opaque = f", without custom calls: {', '.join(found.opaque)}" if found.opaque else ""
    lines = [
        f"FLOPs        {found.flops:.4g} of products on each device{opaque}",
        f"memory       {found.moved / 1e9:,.4g} GB read and written on each device",
    ]
    if found.collectives:
        between = machine.between_slices(mesh)
        rows = [("collective", "axes", "times", "GB from each device", "s at best")]
        for each in found.collectives:
            axes = " x ".join(each.axes) or "other groups"
            crosses = " (between slices)" if between & set(each.axes) else ""
            at_best = "" if machine.chip is None else f"{seconds(each, machine.chip, between):.3g}"
            rows.append((each.kind, axes + crosses, f"{each.count:,}", f"{each.sent / 1e9:,.4g}", at_best))
        lines += ["", aligned(rows)]
    return "\n".join(lines)


def describe_speed(guess: Estimate, what: str, tokens: int, per_token: float = 0.0, peak: float = 0.0) -> str:
    """Two lines; with FLOPs per token and the peak of the machine also the MFU."""

    def at(step: float) -> str:
        mfu = f", MFU {tokens * per_token / (step * peak):.1%}" if peak else ""
        return f"{step:.3g} s {what}, {tokens / step:,.0f} tokens/s{mfu}"

    return (
        f"at best      {at(guess.overlapped)}: products {guess.products:.3g} s, memory {guess.memory:.3g} s, network "
        f"{guess.network:.3g} s at one time, limited by {guess.limit}\n"
        f"one by one   {at(guess.in_turn)}"
    )


if __name__ == "__main__":
    cli.main(main)
