"""A state partly in the memory of hosts learns the same, and the compiled step takes the memory of all of it again."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, ScheduleFree
from cpmjax.training import offload
from cpmjax.training.memory import on_device
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.program import lower_step
from cpmjax.training.state import abstract_state, averaged_parameters, create_state
from cpmjax.training.step import Rates, batch_sharding

MODEL = ModelConfig(vocabulary=61, width=16, layers=3, heads=2, feed_forward=40, dim_model_base=8, tied=False)
CONFIG = Config(
    model=MODEL,
    compute=ComputeConfig(remat="none"),
    data=DataConfig(sequence_length=12),
    training=TrainingConfig(batch_size=4),
)
HAS_HOST_MEMORY = "pinned_host" in {memory.kind for memory in jax.devices()[0].addressable_memories()}


def compiled(config: Config):
    """(optimizer, abstract state, compiled step) on one device."""
    mesh, optimizer = make_mesh(MeshConfig(), jax.devices()[:1]), make_optimizer(MODEL, config.optimizer)
    averaged = config.training.ema is not None
    abstract = abstract_state(MODEL, optimizer, mesh, averaged=averaged, offload=config.optimizer.offload)
    with jax.set_mesh(mesh):
        return optimizer, abstract, lower_step(config, optimizer, abstract, batch_sharding(mesh, config)).compile()


@pytest.mark.parametrize(
    "optimizer, ema",
    [
        (AdamW(), None),
        (AdamW(state_dtype="int8"), 0.9),
        (Adafactor(), None),
        pytest.param(Muon(), 0.9, marks=pytest.mark.slow),
        pytest.param(ScheduleFree(), None, marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, OptimizerConfig) else str(value),
)
def test_the_new_state_takes_every_byte_of_the_old_one(optimizer, ema):
    config = replace(CONFIG, optimizer=optimizer, training=replace(CONFIG.training, ema=ema))
    _, abstract, step = compiled(config)
    assert step.memory_analysis().alias_size_in_bytes == on_device(abstract)


def batch(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    tokens = random.integers(0, MODEL.vocabulary, (4, 13)).astype(np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12))
    weights = random.uniform(0.5, 1, (4, 12)).astype(np.float32)
    if number == 3:
        weights[0, 0] = np.nan
    ones = np.ones_like(places)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": places,
        "segments": ones,
        "weights": weights,
    }


def learned(config: Config):
    """(metrics of each step, last state, average)"""
    optimizer, abstract, step = compiled(config)
    state, found = create_state(MODEL, optimizer, abstract, seed=5), []
    for number in range(6):
        state, metrics = step(state, batch(number), Rates(np.float32(0.01), np.float32(0.001)))
        found.append({name: float(value) for name, value in metrics.items()})
    for x, declared in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert x.sharding.memory_kind == declared.sharding.memory_kind
    return found, jax.device_get(state), averaged_parameters(state)


@pytest.mark.skipif(not HAS_HOST_MEMORY, reason="this jax's CPU has no pinned_host memory")
@pytest.mark.parametrize(
    "optimizer, ema",
    [
        (AdamW(), 0.9),
        pytest.param(AdamW(state_dtype="int8"), None, marks=pytest.mark.slow),
        pytest.param(Lion(), None, marks=pytest.mark.slow),
        pytest.param(Muon(), None, marks=pytest.mark.slow),
        pytest.param(ScheduleFree(), None, marks=pytest.mark.slow),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, OptimizerConfig) else str(value),
)
def test_an_offloaded_run_learns_as_one_that_is_not(optimizer, ema):
    """Also that a step which is not finite, the fourth, changes nothing."""
    config = replace(CONFIG, optimizer=optimizer, training=replace(CONFIG.training, ema=ema))
    expected, state, average = learned(config)
    found, offloaded, its_average = learned(replace(config, optimizer=replace(optimizer, offload=True)))
    assert [metrics["skipped"] for metrics in found] == [0, 0, 0, 1, 1, 1]
    rounded = optimizer.state_dtype == "int8"  # with other draws
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=0.1 if rounded else 1e-4, nan_ok=True)
    if not rounded:
        for tree, wanted in ((offloaded, state), (its_average, average)):
            for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not HAS_HOST_MEMORY, reason="this jax's CPU has no pinned_host memory")
def test_all_that_belongs_to_parameters_is_offloaded():
    mesh, optimizer = make_mesh(MeshConfig(), jax.devices()[:1]), make_optimizer(MODEL, AdamW())
    state = abstract_state(MODEL, optimizer, mesh, offload=True)
    kinds = {(leaf.ndim > 0, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(state.optimizer)}
    assert kinds == {(True, "pinned_host"), (False, "device")}
    assert "pinned_host" not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.trainable)}


def test_a_device_without_such_memory_is_refused(monkeypatch):
    monkeypatch.setattr(offload, "PINNED", "elsewhere")
    mesh, optimizer = make_mesh(MeshConfig(), jax.devices()[:1]), make_optimizer(MODEL, AdamW())
    with pytest.raises(
        UserError, match=r"^optimizer\.offload = True: cpu reaches .*; expected a device with elsewhere"
    ):
        abstract_state(MODEL, optimizer, mesh, offload=True)
