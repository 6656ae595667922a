"""What a training step changes: declared abstractly first, then made by one sharded, jitted initialisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import contrib

from cpmjax.model.initialise import initialise
from cpmjax.model.mup import Scales
from cpmjax.model.parameters import Tree, axes_of, flat, owner, path_name, specs
from cpmjax.parallel.sharding import named_sharding, padded_shape
from cpmjax.run.config import ModelConfig
from cpmjax.training.average import Average, new_average
from cpmjax.training.offload import fetched, on_host
from cpmjax.training.padding import padded, unpadded


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    trainable: Tree
    optimizer: optax.OptState
    skipped: jax.Array  # int32: steps left out because their loss was not finite
    average: Average | None = None  # of the parameters, where the run keeps one


def parameter_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """Where each parameter lives. Raises UserError, with the numbers, for a mesh that does not divide one of its axes;
    but the vocabulary, which is padded."""
    # Heads go whole to a part, and with them the key and value that they share.
    named_sharding(mesh, ("heads",), (config.kv,), "model.heads" if config.kv_heads is None else "model.kv_heads")

    def leaf(path, spec):
        shape = padded_shape(mesh, spec.axes, spec.shape)
        return named_sharding(mesh, spec.axes, shape, f"parameter {path_name(path)}")

    return jax.tree_util.tree_map_with_path(leaf, specs(config))


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averaged: bool = False,
    offload: bool = False,
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with their shardings: what has the shape of its parameter lives where the
    parameter does, as what has one entry for each of its rows, and every device has the rest, which is small (counts,
    means over rows or columns). `offload` keeps what the optimizer knows of parameters in the memory of hosts;
    UserError if the devices know none."""
    parameter_shardings(config, mesh)  # refuses what the mesh does not divide
    declared, replicated = flat(specs(config)), NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        name = owner(path)
        axes = axes_of(declared[name], leaf.shape) if name in declared else None
        if axes is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
        shape = padded_shape(mesh, axes, leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=named_sharding(mesh, axes, shape, name))

    shapes = jax.eval_shape(lambda: initial_state(config, optimizer, jax.random.key(0), averaged=averaged))
    state = jax.tree_util.tree_map_with_path(place, shapes)
    return replace(state, optimizer=on_host(state.optimizer)) if offload else state


def initialisation(
    config: ModelConfig, optimizer: optax.GradientTransformation, abstract: TrainState
) -> jax.stages.Wrapped:
    """A jitted function: key -> parameters drawn from it and fresh moments, of which each device makes its own part."""
    averaged = abstract.average is not None

    def make(key: jax.Array) -> TrainState:
        return padded(initial_state(config, optimizer, key, averaged=averaged), abstract)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))


def create_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
    """What `initialisation` makes of a seed."""
    return initialisation(config, optimizer, abstract)(jax.random.key(seed))


def new_moments(
    config: ModelConfig, optimizer: optax.GradientTransformation, parameters: Tree, abstract: optax.OptState
) -> optax.OptState:
    """Fresh moments for parameters that are there already, placed as the abstract ones."""

    def make(parameters: Tree) -> optax.OptState:
        return padded(optimizer.init(unpadded(config, parameters)), abstract)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(parameters)


def initial_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    given: Scales | None = None,
    averaged: bool = False,
) -> TrainState:
    """Pure; `given` replaces the scales of the model's own parametrisation."""
    trainable = initialise(config, key, given)
    average = new_average(trainable) if averaged else None
    return TrainState(trainable, optimizer.init(trainable), jnp.zeros((), jnp.int32), average)


def averaged_parameters(state: TrainState) -> Tree | None:
    """What the average of a run is, placed as its parameters are; None if it has none.

    It is that of `training.ema`, or the x of schedule-free AdamW, found from y, which is trained, and z.
    """
    if state.average is not None:
        return state.average.parameters
    for part in state.optimizer:
        if isinstance(part, contrib.ScheduleFreeState):
            shardings = jax.tree.map(lambda x: x.sharding, state.trainable)

            def find(part: contrib.ScheduleFreeState, parameters: Tree) -> Tree:
                return contrib.schedule_free_eval_params(fetched(part), parameters)

            return jax.jit(find, out_shardings=shardings)(part, state.trainable)
    return None
