"""Twenty steps on every kind of mesh learn what one device learns: packed rows, micro-batches, an odd vocabulary."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from devices import on_eight_devices
from jax.sharding import Mesh

from cpmjax.model.parameters import flat, specs
from cpmjax.parallel.costs import costs
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.optimizers import AdamW
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.padding import at_rest
from cpmjax.training.program import lower_step
from cpmjax.training.state import TrainState, abstract_state, create_state
from cpmjax.training.step import Rates, batch_sharding

# Embedding and head have 303 rows and columns: no axis but one of size 1 divides them.
MODEL = ModelConfig(
    vocabulary=303, width=32, layers=2, heads=8, kv_heads=4, feed_forward=64, dim_model_base=16, tied=False
)
ROWS, LENGTH, STEPS = 16, 16, 20
CONFIG = Config(
    model=MODEL,
    data=replace(DataConfig(), sequence_length=LENGTH),
    training=replace(TrainingConfig(), batch_size=ROWS, accumulation=1),
)
OUTER = ("embedding", "head")
ONE = MeshConfig(data=1)
MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 4 x fsdp 2": MeshConfig(data=1, fsdp=2, tensor=4),
    "sequence 2 x fsdp 4": MeshConfig(data=1, fsdp=4, sequence=2),
    "data 2 x fsdp 2 x tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
SPLIT = [name for name, sizes in MESHES.items() if sizes.tensor > 1]  # the vocabulary


def batch(step: int) -> dict[str, np.ndarray]:
    """Rows of two or three documents and some padding at their end, cut at other places in each."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, MODEL.vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)
    tokens[:, -1] = MODEL.vocabulary - 1  # the last one is a target, too
    segments, positions = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ends = np.sort(random.choice(np.arange(1, LENGTH), size=2 + row % 2, replace=False))
        for document, (first, end) in enumerate(zip([0, *ends], [*ends, LENGTH - row % 3], strict=True), 1):
            segments[row, first:end] = document
            positions[row, first:end] = np.arange(max(0, end - first))
    weights = random.uniform(0.5, 1, (ROWS, LENGTH)).astype(np.float32) * (segments > 0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": segments,
        "weights": weights.astype(np.float32),
    }


def learn(sizes: MeshConfig, accumulation: int) -> dict[str, Any]:
    """Losses and norms of the gradient at each step; all gradients of the first and the parameters after the last."""
    config = replace(CONFIG, training=replace(CONFIG.training, accumulation=accumulation))
    devices = int(np.prod([*asdict(sizes).values()]))
    mesh, optimizer = make_mesh(sizes, jax.devices()[:devices]), make_optimizer(MODEL, AdamW())
    by_row = batch_sharding(mesh, config)
    found: dict[str, Any] = {"losses": [], "norms": []}
    with jax.set_mesh(mesh):
        abstract = abstract_state(MODEL, optimizer, mesh)
        step = lower_step(config, optimizer, abstract, by_row).compile()
        found["aliased"] = step.memory_analysis().alias_size_in_bytes
        state = create_state(MODEL, optimizer, abstract, seed=7)
        found["held"] = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
        for number in range(STEPS):
            placed = {name: jax.device_put(values, by_row) for name, values in batch(number).items()}
            state, metrics = step(state, placed, Rates(np.float32(0.01), np.float32(0.001)))
            found["losses"].append(float(metrics["loss"]))
            found["norms"].append({name: float(metrics[name]) for name in metrics if name.startswith("grad_norm")})
            if number == 0:  # (1 - beta1) of the gradient, clipped as a whole
                found["gradients"] = host(at_rest(MODEL, state.optimizer[1].mu))
        found["sent"] = sent(step, mesh)
    return found | {"parameters": host(at_rest(MODEL, state.trainable)), "padding": padding(state)}


def sent(step: jax.stages.Compiled, mesh: Mesh) -> dict[str, float]:
    """Bytes from each device by collective and axes."""
    return {f"{each.kind} {' x '.join(each.axes)}": each.sent for each in costs(step, mesh).collectives}


def sent_by_an_even_vocabulary(sizes: MeshConfig) -> dict[str, float]:
    model = replace(MODEL, vocabulary=MODEL.vocabulary + 1)
    mesh, optimizer = make_mesh(sizes), make_optimizer(model, AdamW())
    with jax.set_mesh(mesh):
        abstract, config = abstract_state(model, optimizer, mesh), replace(CONFIG, model=model)
        return sent(lower_step(config, optimizer, abstract, batch_sharding(mesh, config)).compile(), mesh)


def host(tree: Any) -> dict[str, list]:
    return {name: np.asarray(values).tolist() for name, values in flat(tree).items()}


def padding(state: TrainState) -> dict[str, list]:
    """Of each array that has it: how much it is, and the largest number in it."""
    found = {}
    for kind, tree in (("trainable", state.trainable), ("mu", state.optimizer[1].mu), ("nu", state.optimizer[1].nu)):
        for name, spec in flat(specs(MODEL)).items():
            whole = np.array(flat(tree)[name])
            whole[tuple(map(slice, spec.shape))] = 0
            if whole.shape != spec.shape:
                found[f"{kind}/{name}"] = [whole.size - int(np.prod(spec.shape)), float(np.abs(whole).max())]
    return found


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By mesh and micro-batches, from one process with eight simulated devices."""
    file = tmp_path_factory.mktemp("meshes") / "learned.json"
    stderr = on_eight_devices(__file__, f"write({str(file)!r})")
    assert "rematerialization" not in stderr, stderr
    return json.loads(file.read_text())


def write(file: str) -> None:
    found = {"one": learn(ONE, 1)}
    for name, sizes in MESHES.items():
        found |= {f"{name}, {accumulation}": learn(sizes, accumulation) for accumulation in (1, 2)}
    found["even"] = {name: sent_by_an_even_vocabulary(MESHES[name]) for name in SPLIT}
    Path(file).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_learns_what_one_device_learns(learned, name, accumulation):
    one, found = learned["one"], learned[f"{name}, {accumulation}"]
    assert one["losses"][-1] < one["losses"][0]
    np.testing.assert_allclose(found["losses"], one["losses"], rtol=0, atol=1e-5)
    for step, norms in enumerate(one["norms"]):
        assert found["norms"][step] == pytest.approx(norms, rel=1e-5), step
    for leaf, expected in one["gradients"].items():
        difference = np.linalg.norm(np.subtract(found["gradients"][leaf], expected))
        assert difference <= 1e-5 * np.linalg.norm(expected), leaf
    for leaf, expected in one["parameters"].items():
        np.testing.assert_allclose(found["parameters"][leaf], expected, rtol=0, atol=1e-5, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_only_a_split_vocabulary_is_padded_and_its_padding_stays_zero(learned, name):
    found = learned[f"{name}, 1"]["padding"]
    kinds = ("trainable", "mu", "nu") if name in SPLIT else ()
    assert found == {f"{kind}/{leaf}": [MODEL.width, 0.0] for kind in kinds for leaf in OUTER}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_state_is_split_and_its_memory_used_again(learned, name):
    found, sizes = learned[f"{name}, 1"], MESHES[name]
    whole = learned["one"]["held"]
    parts = sizes.fsdp * sizes.tensor
    # Norm gains, whose width tensor does not split, and padding are the little more than an equal share.
    assert whole / parts <= found["held"] < 1.1 * whole / parts
    assert found["aliased"] >= found["held"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLIT)
def test_padding_costs_no_traffic(learned, name):
    """Beside the one of a vocabulary that is divided, which is one token more."""
    found, even = learned[f"{name}, 1"]["sent"], learned["even"][name]
    assert found.keys() == even.keys()
    for kind, size in even.items():
        assert found[kind] <= 1.01 * size + 64, kind
