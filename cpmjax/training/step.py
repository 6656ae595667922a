"""The training step and the evaluation step: pure functions, jitted by their caller.

A batch is a dict of [B, L] arrays: tokens, targets, positions, segments (int32) and weights (float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from cpmjax.model.loss import TokenLosses, batch_losses
from cpmjax.model.mup import Multipliers
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import named_sharding
from cpmjax.run.config import ComputeConfig, Config, ModelConfig
from cpmjax.training.average import moved
from cpmjax.training.metrics import norms_by_role
from cpmjax.training.offload import offloaded
from cpmjax.training.padding import padded, unpadded
from cpmjax.training.state import TrainState
from cpmjax.training.turns import changed_in_turns, norms_in_turns

Batch = dict[str, Any]


def batch_sharding(mesh: Mesh, config: Config) -> NamedSharding:
    """Of batches and micro-batches. Raises UserError if the mesh does not divide a micro-batch of any step."""
    training, length = config.training, config.data.sequence_length
    for rows in {training.batch_size, *(rows for rows, _ in training.batch_warmup)}:
        micro_batch = (rows // training.micro_batches(rows), length)
        name = f"a micro-batch of {rows} rows a step (training, data.sequence_length)"
        sharding = named_sharding(mesh, ("rows", "length"), micro_batch, name)
    return sharding


def abstract_batch(config: Config, sharding: NamedSharding) -> Batch:
    """The shapes, types and placement of a batch, to compile for before there is one."""
    shape = (config.training.batch_size, config.data.sequence_length)
    types = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in types.items()}


# (trainable parameters, batch) -> (what is minimised, {metric: value}), all summed over tokens by their weights.
LossFunction = Callable[[Tree, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class Rates(NamedTuple):
    """What a step is told about the optimizer: float32 scalars (see `cpmjax.model.mup.per_step`)."""

    learning_rate: ArrayLike
    weight_decay: ArrayLike


def _losses(
    config: ModelConfig, compute: ComputeConfig, parameters: Tree, batch: Batch, multipliers: Multipliers | None
) -> TokenLosses:
    return batch_losses(MiniCPM(config, parameters, compute, multipliers), batch)


def next_token_loss(
    config: ModelConfig, compute: ComputeConfig, z_loss: float, multipliers: Multipliers | None = None
) -> LossFunction:
    """Cross entropy, plus z_loss * logsumexp(logits)^2 in what is minimised (PaLM, section 5).

    `multipliers` replace those of the model's own parametrisation.
    """

    def loss(parameters: Tree, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses, weights = _losses(config, compute, parameters, batch, multipliers), batch["weights"]
        minimised = losses.loss + z_loss * losses.logsumexp**2 if z_loss else losses.loss
        sums = {"loss": losses.loss, "logit_rms": losses.logit_rms}
        return jnp.sum(weights * minimised), {name: jnp.sum(weights * value) for name, value in sums.items()}

    return loss


def make_step(
    config: ModelConfig,
    loss_function: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    accumulation: int,
    ema: float | None = None,
) -> Callable[[TrainState, Batch, Rates], tuple[TrainState, dict[str, jax.Array]]]:
    """A step -> (new state, metrics as float32 scalars).

    The gradient is that of the mean over all weighted tokens of the batch, also when it is accumulated over
    micro-batches. `ema` is that of the state's average, if it has one. A step whose loss, gradient or update is not
    finite changes nothing but the count `skipped`. Of a state whose optimizer's part lies in the memory of hosts, the
    update is made layer by layer (`cpmjax.training.turns`).
    """
    gradient = jax.value_and_grad(loss_function, has_aux=True)

    def accumulated(trainable: Tree, batch: Batch):
        if accumulation == 1:
            return gradient(trainable, batch)

        # Every accumulation-th row: each micro-batch has rows on every device.
        def micro_batches(x: jax.Array) -> jax.Array:
            return x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)

        def add(total, micro_batch: Batch):
            return jax.tree.map(jnp.add, total, gradient(trainable, micro_batch)), None

        stacked = jax.tree.map(micro_batches, batch)
        first = jax.tree.map(lambda x: x[0], stacked)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, trainable, first))
        return jax.lax.scan(add, zero, stacked)[0]

    def step(placed: TrainState, batch: Batch, rates: Rates) -> tuple[TrainState, dict[str, jax.Array]]:
        (_, sums), grads = accumulated(unpadded(config, placed.trainable), batch)
        weight = jnp.sum(batch["weights"])
        means = {name: value / weight for name, value in sums.items()}
        grads = jax.tree.map(lambda x: x / weight, grads)
        grad_norm = optax.global_norm(grads)

        def update(state: TrainState, grads: Tree) -> tuple[Tree, optax.OptState]:
            return optimizer.update(
                grads,
                state.optimizer,
                state.trainable,
                learning_rate=rates.learning_rate,
                weight_decay=rates.weight_decay,
                grad_norm=grad_norm,
            )

        def is_finite(updates: Tree) -> jax.Array:
            return jnp.isfinite(means["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.global_norm(updates))

        def moved_on(state: TrainState, updates: Tree, moments: optax.OptState, finite: jax.Array) -> TrainState:
            trainable = optax.apply_updates(state.trainable, updates)
            average = moved(state.average, trainable, ema) if ema is not None and state.average is not None else None
            new = TrainState(trainable, moments, state.skipped, average)
            unchanged = replace(state, skipped=state.skipped + 1)
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, unchanged)

        if offloaded(placed.optimizer):

            def turn(part: TrainState, slopes: Tree) -> TrainState:
                state = unpadded(config, part)
                return padded(moved_on(state, *update(state, slopes), finite), part)

            updates = norms_in_turns(lambda part, slopes: update(unpadded(config, part), slopes)[0], placed, grads)
            finite = is_finite(updates)
            new = changed_in_turns(turn, placed, grads)
        else:
            state = unpadded(config, placed)
            updates, moments = update(state, grads)
            new = padded(moved_on(state, updates, moments, is_finite(updates)), placed)
        metrics = means | {"grad_norm": grad_norm, "skipped": new.skipped.astype(jnp.float32)}
        metrics |= norms_by_role("grad_norm", config, grads) | norms_by_role("update_norm", config, updates)
        return new, metrics

    return step


class HeldOutSums(NamedTuple):
    """float32 sums over a batch."""

    nats: jax.Array
    tokens: jax.Array
    bytes: jax.Array  # of text, as UTF-8, that the targets stand for


def make_evaluation(config: ModelConfig, compute: ComputeConfig) -> Callable[..., HeldOutSums]:
    """(parameters, batch, bytes of each token [V]) -> sums from which nats per token and bits per byte follow.

    A fourth argument replaces the multipliers of the model's own parametrisation.
    """

    def evaluate(
        parameters: Tree, batch: Batch, byte_lengths_V: jax.Array, multipliers: Multipliers | None = None
    ) -> HeldOutSums:
        weights, parameters = batch["weights"], unpadded(config, parameters)
        nats = jnp.sum(weights * _losses(config, compute, parameters, batch, multipliers).loss)
        return HeldOutSums(nats, jnp.sum(weights), jnp.sum(weights * byte_lengths_V[batch["targets"]]))

    return evaluate
