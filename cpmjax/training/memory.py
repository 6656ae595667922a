"""What a training step holds on a device, by kind, and what would make it hold less."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cpmjax.model.parameters import Tree
from cpmjax.parallel.compiled import Memory
from cpmjax.parallel.sharding import RULES
from cpmjax.run.config import Config
from cpmjax.run.optimizers import Adafactor, AdamW
from cpmjax.training.offload import PINNED
from cpmjax.training.padding import unpadded
from cpmjax.training.state import TrainState
from cpmjax.training.step import abstract_batch, batch_sharding, next_token_loss


class Held(NamedTuple):
    """Bytes on one device."""

    parameters: int
    optimizer: int
    on_host: int  # of the optimizer as well, but in the memory of the device's host
    average: int
    batch: int
    gradients: int  # of the temporaries: as large as the parameters
    activations: int  # of the temporaries: kept from the forward pass for the backward pass, by what the trace says
    workspace: int  # the rest of the temporaries; less than nothing of it is none


def held(config: Config, abstract: TrainState, batch: Tree, used: Memory, mesh: Mesh) -> Held:
    """By kind, of a step that was compiled for this state and batch and uses this memory.

    Temporaries never all exist at one time, so the last three need not add up to what the compiler found.
    """
    parameters = on_device(abstract.trainable)
    activations = kept_for_backward(config, abstract.trainable, mesh)
    return Held(
        parameters,
        on_device(abstract.optimizer),
        on_host(abstract.optimizer),
        on_device(abstract.average),
        on_device(batch),
        parameters,
        activations,
        max(0, used.temporaries - parameters - activations),
    )


def on_device(tree: Any) -> int:
    """Bytes that each device holds of arrays, or of abstract ones, with shardings."""
    return sum(_part(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != PINNED)


def on_host(tree: Any) -> int:
    """Bytes that each device has in the memory of its host."""
    return sum(_part(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind == PINNED)


def _part(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def kept_for_backward(config: Config, parameters: Tree, mesh: Mesh) -> int:
    """Bytes on a device of what the forward pass of a micro-batch keeps, but for what has no rows (weights, say).

    Found as what more rows would add. That heads or feed-forward are split over `tensor` is not counted.
    """
    training, by_row = config.training, batch_sharding(mesh, config)
    true = jax.eval_shape(lambda tree: unpadded(config.model, tree), parameters)

    def kept(times: int) -> int:
        rows = times * training.batch_size // training.accumulation
        # As many positions in a chunk of logits, however many rows there are.
        compute = replace(config.compute, loss_chunk=times * config.compute.loss_chunk)
        loss = next_token_loss(config.model, compute, training.z_loss)
        batch = abstract_batch(config.of_batch(rows), by_row)
        residuals = jax.eval_shape(lambda p, b: jax.vjp(lambda p: loss(p, b), p, has_aux=True)[1], true, batch)
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals))

    return (kept(2) - kept(1)) // mesh.size


def remedies(config: Config, abstract: TrainState, held: Held, mesh: Mesh) -> list[tuple[str, float]]:
    """(key=value, bytes that it would save on each device, about): the most helpful first."""
    found: dict[str, float] = {}
    rows = config.training.batch_size // config.training.accumulation
    per_device = rows // math.prod(mesh.shape[axis] for axis in RULES["rows"])
    state = held.parameters + held.optimizer + held.average + held.gradients
    if mesh.shape["data"] > 1:
        found[f"--mesh.data=1 --mesh.fsdp={mesh.shape['data'] * mesh.shape['fsdp']}"] = state * (
            1 - 1 / mesh.shape["data"]
        )
    found[f"twice the devices, --mesh.fsdp={2 * mesh.shape['fsdp']}"] = state / 2
    if config.compute.remat != "block":
        compute = replace(config.compute, remat="block")
        less = kept_for_backward(replace(config, compute=compute), abstract.trainable, mesh)
        found["--compute.remat=block"] = held.activations - less
    if per_device > 1:
        half = 2 * config.training.accumulation
        found[f"--training.accumulation={half}"] = held.activations / 2
    elif config.data.sequence_length % 2 == 0:
        found[f"twice the devices, --mesh.sequence={2 * mesh.shape['sequence']}"] = held.activations / 2
    if isinstance(config.optimizer, AdamW):
        found["--optimizer.type=adafactor"] = held.optimizer
    if not isinstance(config.optimizer, Adafactor) and not config.optimizer.offload:
        found["--optimizer.offload=true"] = held.optimizer
        if config.optimizer.state_dtype == "float32":
            found["--optimizer.state_dtype=bfloat16"] = held.optimizer / 2
            found["--optimizer.state_dtype=int8"] = held.optimizer * 3 / 4
    logits = 3 * 4 * min(config.compute.loss_chunk, per_device * config.data.sequence_length) * config.model.vocabulary
    found[f"--compute.loss_chunk={max(1, config.compute.loss_chunk // 4)}"] = logits * 3 / 4
    return sorted(((key, saved) for key, saved in found.items() if saved > 0), key=lambda item: -item[1])
