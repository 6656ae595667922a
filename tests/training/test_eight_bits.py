"""The state of an optimizer in 8 bits: rounded without bias, second moments never to 0, and a run learns as it did."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from cpmjax.model.parameters import count, flat, owner, specs
from cpmjax.parallel.mesh import AXES, make_mesh
from cpmjax.run.config import ComputeConfig, MeshConfig, ModelConfig
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, ScheduleFree
from cpmjax.training.eight_bits import Encoded, decode, encode
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.padding import abstract_at_rest
from cpmjax.training.state import abstract_state, create_state
from cpmjax.training.step import Rates, make_step, next_token_loss

MODEL = ModelConfig(vocabulary=303, width=32, layers=2, heads=4, feed_forward=64, dim_model_base=16, tied=False)
KEY = jax.random.key(0)


@pytest.mark.parametrize("signed", [True, False])
def test_every_number_of_the_map_is_kept_and_they_are_an_eighth_apart_at_most(signed):
    codes = np.arange(-127, 128) if signed else np.arange(256)
    stored = Encoded(jnp.asarray(codes, jnp.int8 if signed else jnp.uint8)[None], jnp.full((1, 1), 3.0))
    numbers = decode(stored)
    again = encode(numbers, KEY, signed)
    np.testing.assert_array_equal(again.codes, stored.codes)
    np.testing.assert_array_equal(again.scales, stored.scales)
    positive = np.asarray(numbers, np.float64)[0, codes > 0]
    assert positive[-1] == 3.0 and positive[0] == 3.0 * 2.0 ** (-16 if signed else -32) * 1.25
    ratios = positive[1:] / positive[:-1]
    assert ratios.min() >= 1 + 1 / 16 and ratios.max() <= 1 + 1 / 8


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("x", [1.001, 0.3, 3e-3, 2.0**-14])
def test_rounding_goes_to_a_neighbour_and_is_right_in_the_mean(x, signed):
    draws = 100_000
    row = jnp.full(draws, x, jnp.float32).at[0].set(2.0)
    found = np.asarray(decode(encode(-row if signed else row, KEY, signed)), np.float64)[1:]
    found = -found if signed else found
    assert len(np.unique(found)) <= 2
    assert found.min() >= 0.88 * x and found.max() <= 1.13 * x
    assert abs(found.mean() - x) <= 5 * 0.125 * x / 2 / math.sqrt(draws)


def test_what_is_below_the_map_is_0_by_chance_or_never():
    row = jnp.full(100_000, 1e-6, jnp.float32).at[0].set(1.0)
    first = np.asarray(decode(encode(row, KEY, signed=True)), np.float64)[1:]
    assert set(np.unique(first)) == {0.0, 1.25 * 2.0**-16} and first.mean() == pytest.approx(1e-6, rel=0.1)
    second = np.asarray(encode(row * 1e-30, KEY, signed=False).codes)
    assert second.min() > 0
    nothing = encode(jnp.zeros((2, 3)), KEY, signed=False)
    assert not np.any(nothing.codes) and not np.any(decode(nothing))


@functools.cache
def step_of(config: OptimizerConfig):
    """(an optimizer, its jitted step)"""
    optimizer, loss = make_optimizer(MODEL, config), next_token_loss(MODEL, ComputeConfig(), 0.0)
    return optimizer, jax.jit(make_step(MODEL, loss, optimizer, accumulation=1))


def learned(config: OptimizerConfig) -> tuple[list[float], bytes]:
    """Losses of a run that learns which token follows which, and its last state."""
    optimizer, step = step_of(config)
    mesh, found = make_mesh(MeshConfig(), jax.devices()[:1]), []
    state = create_state(MODEL, optimizer, abstract_state(MODEL, optimizer, mesh), seed=3)
    places = np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    ones = {"segments": np.ones_like(places), "weights": np.ones((8, 32), np.float32)}
    for number in range(20):
        steps = np.random.default_rng(number).integers(0, 16, (8, 33)).astype(np.int32)
        tokens = steps.cumsum(axis=1) // 5 % 303
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": places} | ones
        state, metrics = step(state, batch, Rates(np.float32(0.01), np.float32(0.001)))
        found.append(float(metrics["loss"]))
    return found, b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "kind", [AdamW, Lion, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Muon, ScheduleFree))]
)
def test_a_run_learns_as_it_does_in_float32(kind):
    exact, _ = learned(kind())
    found, state = learned(kind(state_dtype="int8"))
    assert found[:2] == pytest.approx(exact[:2], abs=1e-5)  # the first update knows no rounding
    assert exact[-1] < exact[0] - 1
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.02)
    assert learned(kind(state_dtype="int8")) == (found, state)


def test_moments_take_a_byte_each_and_lie_where_their_parameters_do():
    wide, rows = 0, 0
    mesh = AbstractMesh((1, 2, 4, 1), AXES)
    state = abstract_state(MODEL, make_optimizer(MODEL, AdamW(state_dtype="int8")), mesh).optimizer[1]
    for moments, dtype in ((state.codes.mu, jnp.int8), (state.codes.nu, jnp.uint8)):
        for name, leaf in flat(moments).items():
            spec = flat(specs(MODEL))[name]
            assert leaf.dtype == dtype
            assert leaf.shape == tuple(304 if size == 303 else size for size in spec.shape)
            wide += math.prod(spec.shape)
    assert wide == 2 * count(MODEL)
    for moments in (state.scales.mu, state.scales.nu):
        placed = {name: (leaf.shape, leaf.sharding.spec) for name, leaf in flat(moments).items()}
        assert placed["embedding"] == ((304, 1), PartitionSpec(("tensor",), None))
        assert placed["head"] == ((32, 1), PartitionSpec(("fsdp",), None))
        assert placed["layers/down"] == ((2, 64, 1), PartitionSpec(None, ("tensor",), None))
        rows += sum(math.prod(shape) for shape, _ in placed.values())
    assert rows < wide / 20
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    rest = abstract_at_rest(MODEL, abstract_state(MODEL, make_optimizer(MODEL, AdamW(state_dtype="int8")), one))
    assert [owner(path) for path, leaf in jax.tree_util.tree_leaves_with_path(rest.optimizer) if leaf.ndim] != []


def test_adafactor_has_no_moments_to_store():
    assert [key for key, _ in Adafactor(state_dtype="int8", offload=True).problems()] == ["state_dtype", "offload"]
