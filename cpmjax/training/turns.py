"""An update one layer at a time, of a state whose optimizer's part lies in the memory of hosts.

A turn is an ordinary update of a smaller model: one layer and nothing outside the layers, or what is outside and no
layer. There are two rounds of turns, as all updates decide about each of them: one for the norms of the updates, one
that makes them again and keeps them. So the device holds of the optimizer's state what one turn needs, and moments
come to it twice. Parameters are changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from cpmjax.model.parameters import Tree, owner
from cpmjax.training.offload import fetched
from cpmjax.training.state import TrainState


def norms_in_turns(turn: Callable[[TrainState, Tree], Tree], state: TrainState, grads: Tree) -> Tree:
    """turn(part of the state, of its gradients) -> updates; in place of each update here are norms of its parts."""

    def norms(state: TrainState, grads: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.sqrt(jnp.sum(x**2)), turn(fetched(state), grads))

    def of_layer(_: None, arrays: tuple[list, list]) -> tuple[None, list]:
        return None, _in_layers(norms(_one_layer(state, arrays[0]), _one_layer(grads, arrays[1])))

    layers = jax.lax.scan(of_layer, None, (_in_layers(state), _in_layers(grads)))[1]
    return _with_layers(norms(_no_layer(state), _no_layer(grads)), layers)


def changed_in_turns(turn: Callable[[TrainState, Tree], TrainState], state: TrainState, grads: Tree) -> TrainState:
    """turn(part of the state, of its gradients) -> that part of the new state, which lies where the old one does."""
    kept = replace(state, optimizer=None)  # on the device

    def of_layer(stacked: list, arrays: tuple[jax.Array, list, list]) -> tuple[list, list]:
        place, moments, slopes = arrays
        own = [jax.lax.dynamic_index_in_dim(x, place, keepdims=False) for x in stacked]
        part = replace(_one_layer(kept, own), optimizer=_one_layer(state.optimizer, moments))
        new = turn(fetched(part), _one_layer(grads, slopes))
        own = _in_layers(replace(new, optimizer=None))
        stacked = [jax.lax.dynamic_update_index_in_dim(x, y, place, 0) for x, y in zip(stacked, own, strict=True)]
        return stacked, [jax.device_put(x[0], jax.memory.Space.Host) for x in _in_layers(new.optimizer)]

    moments = _in_layers(state.optimizer)
    places = jnp.arange(len(moments[0]))
    stacked, moments = jax.lax.scan(of_layer, _in_layers(kept), (places, moments, _in_layers(grads)))
    new = turn(fetched(_no_layer(state)), _no_layer(grads))
    changed = _with_layers(replace(new, optimizer=None), stacked)
    return replace(changed, optimizer=_with_layers(new.optimizer, moments))


def _is_in_layers(path: tuple[Any, ...]) -> bool:
    return owner(path).startswith("layers/")


def _in_layers(tree: Any) -> list[jax.Array]:
    return [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if _is_in_layers(path)]


def _with_layers(tree: Any, layers: list[jax.Array]) -> Any:
    """The tree with other arrays in its layers."""
    given = iter(layers)
    return jax.tree_util.tree_map_with_path(lambda path, x: next(given) if _is_in_layers(path) else x, tree)


def _no_layer(tree: Any) -> Any:
    return _with_layers(tree, [_nothing(x) for x in _in_layers(tree)])


def _one_layer(tree: Any, slices: list[jax.Array]) -> Any:
    outside = jax.tree_util.tree_map_with_path(
        lambda path, x: _nothing(x) if owner(path) and not _is_in_layers(path) else x, tree
    )
    return _with_layers(outside, [x[None] for x in slices])


def _nothing(x: jax.Array) -> jax.Array:
    return jnp.zeros((0, *x.shape[1:]), x.dtype)
