"""What a step holds, by kind, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest

from cpmjax.parallel import compiled
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.optimizers import Adafactor, AdamW
from cpmjax.training import memory
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.program import lower_step
from cpmjax.training.state import abstract_state
from cpmjax.training.step import abstract_batch, batch_sharding

MODEL = ModelConfig(vocabulary=256, width=64, layers=3, heads=4, feed_forward=128, dim_model_base=16)
ROWS, LENGTH = 4, 64
CONFIG = Config(
    model=MODEL,
    training=TrainingConfig(batch_size=ROWS),
    data=DataConfig(sequence_length=LENGTH),
    compute=ComputeConfig(remat="block", loss_chunk=64),
)
PARAMETERS = 256 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def state(config: Config, mesh):
    return abstract_state(config.model, make_optimizer(config.model, config.optimizer), mesh)


def test_kinds_of_a_compiled_step(mesh):
    abstract, by_row = state(CONFIG, mesh), batch_sharding(mesh, CONFIG)
    with jax.set_mesh(mesh):
        program = lower_step(CONFIG, make_optimizer(MODEL, AdamW()), abstract, by_row).compile()
        used = compiled.memory(program)
        held = memory.held(CONFIG, abstract, abstract_batch(CONFIG, by_row), used, mesh)
    assert held.parameters == held.gradients == 4 * PARAMETERS
    assert held.optimizer == 2 * 4 * PARAMETERS + 4  # and the count of its updates
    assert held.batch == 5 * 4 * ROWS * LENGTH
    assert held.average == 0
    # All of it, and the count of skipped steps and two rates, is what the compiler calls arguments.
    assert used.arguments == held.parameters + held.optimizer + held.batch + 4 + 8
    # Every byte of the state is used again for the new one.
    assert program.memory_analysis().alias_size_in_bytes == held.parameters + held.optimizer + 4


def test_activations_kept_are_those_that_the_policy_keeps(mesh):
    kept = {}
    with jax.set_mesh(mesh):
        for remat in ("block", "dots", "none"):
            config = replace(CONFIG, compute=replace(CONFIG.compute, remat=remat))
            kept[remat] = memory.kept_for_backward(config, state(CONFIG, mesh).trainable, mesh)
        halves = replace(CONFIG, training=replace(CONFIG.training, accumulation=2))
        assert memory.kept_for_backward(halves, state(CONFIG, mesh).trainable, mesh) == kept["block"] // 2
    stream = 4 * ROWS * LENGTH * MODEL.width
    # What enters each block, and around the blocks the final norm, the head's input and some numbers a token.
    assert MODEL.layers * stream <= kept["block"] < (MODEL.layers + 5) * stream
    # With dots also every product: query, key, value, what they mix, output, gate, up, down.
    products = MODEL.layers * (6 * stream + 2 * stream * 128 // 64)
    assert products <= kept["dots"] - MODEL.layers * stream < 1.6 * products
    assert kept["none"] > kept["dots"]


def test_remedies_name_what_is_left_to_do(mesh):
    abstract = state(CONFIG, mesh)
    held = memory.Held(
        parameters=10, optimizer=20, on_host=0, average=0, batch=1, gradients=10, activations=8, workspace=5
    )
    with jax.set_mesh(mesh):
        found = dict(memory.remedies(CONFIG, abstract, held, mesh))
        assert found["--optimizer.type=adafactor"] == 20
        assert found["--optimizer.state_dtype=bfloat16"] == 10
        assert found["--optimizer.offload=true"] == 20
        assert found["twice the devices, --mesh.fsdp=2"] == 20
        assert found["--training.accumulation=2"] == 4
        assert not any("remat" in key for key in found)
        factored = replace(CONFIG, optimizer=Adafactor(), compute=replace(CONFIG.compute, remat="none"))
        found = dict(memory.remedies(factored, abstract, held._replace(activations=10**9), mesh))
    assert "--optimizer.type=adafactor" not in found and "--optimizer.state_dtype=bfloat16" not in found
    assert found["--compute.remat=block"] > 0
