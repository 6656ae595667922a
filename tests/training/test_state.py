"""Parameters are born where they live, and where they live changes no result: one device against eight."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_eight_devices
from jax.sharding import AbstractMesh, NamedSharding

from cpmjax.model.parameters import count, flat, owner, specs
from cpmjax.model.presets import PRESETS
from cpmjax.parallel.costs import costs
from cpmjax.parallel.mesh import AXES, make_mesh
from cpmjax.parallel.sharding import partition
from cpmjax.run.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, ScheduleFree
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.padding import at_rest, from_rest
from cpmjax.training.state import TrainState, abstract_state, create_state, initialisation, parameter_shardings
from cpmjax.training.step import Rates, batch_sharding, make_step, next_token_loss

MODEL = ModelConfig(vocabulary=304, width=32, layers=2, heads=4, feed_forward=64, dim_model_base=16)
ODD = replace(MODEL, vocabulary=303, tied=False)
ROWS, LENGTH, STEPS = 8, 16, 5
OPTIMIZER = make_optimizer(MODEL, AdamW())


def new_state(mesh, optimizer=OPTIMIZER, model=MODEL) -> TrainState:
    with jax.set_mesh(mesh):
        return create_state(model, optimizer, abstract_state(model, optimizer, mesh), seed=7)


def batch(step: int, model=MODEL) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    tokens = random.integers(0, model.vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    weights = random.uniform(0.5, 1, (ROWS, LENGTH)).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": places,
        "segments": np.ones_like(places),
        "weights": weights,
    }


def losses(mesh, optimizer, model) -> list[float]:
    state, loss = new_state(mesh, optimizer, model), next_token_loss(model, ComputeConfig(), z_loss=0.0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    by_row = NamedSharding(mesh, partition(("rows", "length")))
    found = []
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(model, loss, optimizer, accumulation=1), out_shardings=(shardings, None))
        for number in range(STEPS):
            placed = {name: jax.device_put(values, by_row) for name, values in batch(number, model).items()}
            state, metrics = step(state, placed, Rates(np.float32(0.01), np.float32(0.001)))
            found.append(float(metrics["loss"]))
    return found


def check_parts(state: TrainState, parts: int, norm_parts: int) -> None:
    """Each device holds 1/parts of every matrix and of its two moments (1/norm_parts of a norm gain).

    Equal parts of as many distinct places make a whole, so what a device holds is what it must.
    """
    adam = state.optimizer[1]
    for tree in (state.trainable, adam.mu, adam.nu):
        for name, spec in flat(specs(MODEL)).items():
            array, share = flat(tree)[name], norm_parts if spec.role == "norm" else parts
            assert array.shape == spec.shape
            shards = array.addressable_shards
            assert len(shards) == 8
            assert {math.prod(shard.data.shape) for shard in shards} == {math.prod(spec.shape) // share}, name
            assert len({str(shard.index) for shard in shards}) == share, name


def check_eight_devices() -> None:
    """Runs in a process with eight simulated devices."""
    assert len(jax.devices()) == 8
    for model in (MODEL, ODD):
        expected = flat(new_state(make_mesh(MeshConfig(), jax.devices()[:1]), model=model).trainable)
        for mesh, parts, norm_parts in (
            (MeshConfig(data=1, fsdp=8), 8, 8),
            (MeshConfig(data=1, fsdp=4, tensor=2), 8, 4),
            (MeshConfig(data=1, fsdp=4, sequence=2), 4, 4),
        ):
            made = new_state(make_mesh(mesh), model=model)
            if model is MODEL:
                check_parts(made, parts, norm_parts)
            for name, values in flat(at_rest(model, made.trainable)).items():
                np.testing.assert_array_equal(np.asarray(values), np.asarray(expected[name]), err_msg=name)


def check_initialisation_of_the_2b() -> None:
    """Runs in a process with eight simulated devices, none of which ever has an array to itself; nothing is run."""
    model = ModelConfig(tied=False, **PRESETS["minicpm-2b"])
    optimizer = make_optimizer(model, AdamW())
    largest = 4 * max(math.prod(spec.shape) for spec in flat(specs(model)).values())
    for sizes in (MeshConfig(data=1, fsdp=8), MeshConfig(data=1, fsdp=2, tensor=4)):
        mesh = make_mesh(sizes)
        abstract = abstract_state(model, optimizer, mesh)
        program = initialisation(model, optimizer, abstract).lower(jax.random.key(0)).compile()
        held, share = program.memory_analysis(), 3 * 4 * count(model) / 8
        assert share <= held.output_size_in_bytes < 1.001 * share  # parameters and two moments: 4.5 GB
        assert held.temp_size_in_bytes < 0.6 * share
        # The longest is an eighth of the largest parameter, as 64-bit counters of the random numbers.
        arrays = re.findall(r"\b[a-z]+(\d+)\[([\d,]+)\]", program.as_text())
        longest = max(int(bits) // 8 * math.prod(map(int, shape.split(","))) for bits, shape in arrays)
        assert largest / 8 <= longest <= 2 * largest / 8
        assert costs(program, mesh).collectives == ()


def check_every_optimizer_on_eight_devices() -> None:
    """Runs in a process with eight simulated devices: whatever has the shape of a parameter is split as it is."""
    mesh, one = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), make_mesh(MeshConfig(), jax.devices()[:1])
    for kind in (Lion, Adafactor, Muon, ScheduleFree):
        optimizer = make_optimizer(ODD, kind())
        abstract, made = abstract_state(ODD, optimizer, mesh), new_state(mesh, optimizer, ODD)
        split = 0
        for path, leaf in jax.tree_util.tree_leaves_with_path(at_rest(ODD, made.optimizer)):
            spec = flat(specs(ODD)).get(owner(path))
            if spec is not None and spec.shape == leaf.shape and spec.role != "norm":
                split += 1
                # At rest, too.
                assert math.prod(leaf.addressable_shards[0].data.shape) == math.prod(spec.shape) // 8, (kind, path)
            elif spec is None or spec.shape != leaf.shape:
                assert leaf.addressable_shards[0].data.shape == leaf.shape, (kind, path)
        assert (split == 0) == (kind is Adafactor)  # whose matrices have means over rows and columns only
        back = from_rest(at_rest(ODD, made), abstract)
        for there, again, declared in zip(*map(jax.tree.leaves, (made, back, abstract)), strict=True):
            assert there.shape == declared.shape and there.sharding == again.sharding == declared.sharding
            np.testing.assert_array_equal(there, again)
        found, expected = losses(mesh, optimizer, ODD), losses(one, optimizer, ODD)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", ["check_eight_devices", "check_initialisation_of_the_2b", "check_every_optimizer_on_eight_devices"]
)
def test_eight_devices_hold_an_eighth_each(check):
    on_eight_devices(__file__, f"{check}()")


def test_one_device_a_fresh_state_and_its_declaration_agree():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    declared, made = abstract_state(MODEL, OPTIMIZER, mesh), new_state(mesh)
    assert jax.tree.structure(declared) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves(declared), jax.tree.leaves(made), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and b.sharding.is_equivalent_to(a.sharding, b.ndim)
    assert int(made.skipped) == 0 and made.skipped.dtype == jnp.int32
    assert all(not np.any(moment) for moment in jax.tree.leaves(made.optimizer))


@pytest.mark.parametrize(
    "mesh, sizes, message",
    [
        ({"fsdp": 8}, {"width": 36, "heads": 3}, "parameter embedding: axis width of size 36 .* mesh fsdp = 8"),
        (
            {"tensor": 8},
            {"feed_forward": 60, "heads": 8},
            "layers/down: axis feed_forward of size 60 .* mesh tensor = 8",
        ),
        # 16 outputs of 4 heads divide into 8 parts, but a head does not.
        ({"tensor": 8}, {}, "model.heads: axis heads of size 4 cannot be split over mesh tensor = 8"),
        ({"tensor": 4}, {"kv_heads": 2}, "model.kv_heads: axis heads of size 2 cannot be split over mesh tensor = 4"),
        ({"data": 2, "fsdp": 8}, {}, "of 8 rows .*: axis rows of size 8 cannot be split over mesh data x fsdp = 16"),
        ({"fsdp": 8}, {"accumulation": 2}, "of 8 rows .*: axis rows of size 4 .* mesh data x fsdp = 8"),
        ({"sequence": 3}, {}, "data.sequence_length.*: axis length of size 16 cannot be split over mesh sequence = 3"),
    ],
)
def test_what_a_mesh_does_not_divide_is_refused_with_the_numbers(mesh, sizes, message):
    names = {field.name for field in fields(ModelConfig)}
    config = Config(
        model=replace(MODEL, **{key: size for key, size in sizes.items() if key in names}),
        data=replace(DataConfig(), sequence_length=LENGTH),
        training=replace(TrainingConfig(), batch_size=ROWS, accumulation=sizes.get("accumulation", 1)),
    )
    devices = AbstractMesh(tuple(mesh.get(axis, 1) for axis in AXES), AXES)
    with pytest.raises(UserError, match=message) as error:
        parameter_shardings(config.model, devices)
        batch_sharding(devices, config)
    assert "\n" not in str(error.value)


def test_a_vocabulary_is_padded_where_a_mesh_does_not_divide_it():
    model, optimizer = ODD, make_optimizer(ODD, AdamW())
    for tensor, padded in ((1, 303), (2, 304), (4, 304)):
        state = abstract_state(model, optimizer, AbstractMesh((1, 2, tensor, 1), AXES))
        for tree in (state.trainable, state.optimizer[1].mu, state.optimizer[1].nu):
            assert {path: leaf.shape for path, leaf in flat(tree).items()} == {
                path: tuple(padded if size == 303 else size for size in spec.shape)
                for path, spec in flat(specs(model)).items()
            }
    assert sum(leaf.size for leaf in jax.tree.leaves(state.trainable)) - count(model) == 2 * model.width
