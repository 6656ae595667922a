"""The state of an optimizer in bfloat16: rounded without bias, moments only, and no update is far from float32's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import owner
from cpmjax.run.config import ModelConfig
from cpmjax.run.optimizers import OptimizerConfig
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.rounding import at_rest_in_bfloat16, stochastically

MODEL = ModelConfig(vocabulary=29, width=16, layers=2, heads=2, feed_forward=40, dim_model_base=8)
KINDS = OptimizerConfig.get_known_choices()


@pytest.mark.parametrize("x", [1.001, -0.3, 3e-30, 1.0, 0.0])
def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(x):
    draws = 200_000
    found = np.asarray(stochastically(jnp.full(draws, x, jnp.float32), jax.random.key(0)), np.float64)
    exact = float(np.float32(x))
    below, above = np.unique(found)[[0, -1]]
    assert below <= exact <= above and len(np.unique(found)) <= 2
    step = abs(exact) * 2.0**-7
    assert above - below <= step
    assert abs(found.mean() - exact) <= 5 * step / 2 / np.sqrt(draws)


def test_a_slow_moment_does_not_stand_still():
    """With beta2 = 0.999 a second moment loses 0.1 per cent in an update, less than bfloat16 rounds away to nearest."""
    rule = at_rest_in_bfloat16(optax.scale_by_adam(b2=0.999))
    parameters = {"a": jnp.ones(4096)}
    state = rule.init(parameters)
    _, state = rule.update({"a": jnp.ones(4096)}, state)

    def quiet(state, _):
        return rule.update({"a": jnp.zeros(4096)}, state)[1], None

    state, _ = jax.jit(lambda state: jax.lax.scan(quiet, state, None, 500))(state)
    assert state.nu["a"].dtype == jnp.bfloat16 and int(state.count) == 501
    assert float(state.nu["a"].astype(jnp.float32).mean()) == pytest.approx(0.001 * 0.999**500, rel=0.01)


@functools.cache
def parameters():
    return jax.device_get(jax.jit(initialise, static_argnums=0)(MODEL, jax.random.key(0)))


def steps(optimizer, number: int):
    """The updates of each step and the state after them."""

    update, random = jax.jit(optimizer.update), np.random.default_rng(0)
    trainable, state, found = parameters(), jax.jit(optimizer.init)(parameters()), []
    for _ in range(number):
        grads = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), trainable)
        updates, state = update(grads, state, trainable, learning_rate=0.01, weight_decay=0.001)
        trainable = jax.tree.map(np.add, trainable, jax.device_get(updates))
        found.append(updates)
    return found, state


@pytest.mark.parametrize("kind", KINDS)
def test_only_moments_are_rounded_and_updates_are_those_of_float32_within_it(kind):
    exact, wide = steps(make_optimizer(MODEL, KINDS[kind]()), 4)
    optimizer = make_optimizer(MODEL, KINDS[kind](state_dtype="bfloat16"))
    found, state = steps(optimizer, 4)
    assert jax.tree.structure(state) == jax.tree.structure(wide)
    for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(wide), strict=True):
        is_moment = owner(path) and ".z" not in jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.bfloat16 if is_moment else other.dtype), path
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype == jnp.float32
    # The first update knows no rounding. Later ones see moments that are off by a part in 2^8; a sign, which may turn
    # where a momentum is near 0, is what Lion makes of it.
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(exact[0]), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-7)  # fused in another order
    for a, b in zip(jax.tree.leaves(found[3]), jax.tree.leaves(exact[3]), strict=True):
        distance = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b))
        assert distance < (0.3 if kind == "lion" else 0.03)
    again, _ = steps(optimizer, 4)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
