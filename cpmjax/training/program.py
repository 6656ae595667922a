"""The program of a training step, from shapes alone: what a run executes, and what a plan reads."""

from __future__ import annotations

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from cpmjax.run.config import Config
from cpmjax.training.state import TrainState, abstract_state
from cpmjax.training.step import Rates, abstract_batch, make_step, next_token_loss


def declared_state(config: Config, optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh) -> TrainState:
    """The abstract state that a run of this configuration has on a mesh."""
    averaged = config.training.ema is not None
    return abstract_state(config.model, optimizer, mesh, averaged=averaged, offload=config.optimizer.offload)


def lower_step(
    config: Config, optimizer: optax.GradientTransformationExtraArgs, abstract: TrainState, by_row: NamedSharding
) -> jax.stages.Lowered:
    """The step of `training.batch_size` rows for a state and batches placed as these are, under `jax.set_mesh`.

    Nothing is allocated, and the devices need not exist. The state is donated: the new one takes its memory.
    """
    training = config.training
    loss = next_token_loss(config.model, config.compute, training.z_loss)
    step = make_step(config.model, loss, optimizer, training.accumulation, training.ema)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    return jitted.lower(abstract, abstract_batch(config, by_row), Rates(np.float32(0), np.float32(0)))
