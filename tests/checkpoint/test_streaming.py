"""Checkpoints that are written and read slice by slice are ordinary ones, and never whole in memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.checkpoint.streaming import chunk_shape
from cpmjax.model.parameters import ParamSpec, flat, specs
from cpmjax.model.weights import BFLOAT16, FLOAT32, Weights, cast, slice_shape
from cpmjax.run.config import CheckpointConfig, ModelConfig
from cpmjax.run.errors import UserError

CONFIG = ModelConfig(vocabulary=50, width=16, layers=12, heads=2, feed_forward=24, dim_model_base=16, tied=False)


def random_weights(dtype: np.dtype = BFLOAT16) -> Weights:
    declared = flat(specs(CONFIG))

    def read(path: str, layer: int | None) -> np.ndarray:
        draw = np.random.default_rng([*path.encode(), layer or 0])
        return draw.normal(size=slice_shape(declared[path])).astype(np.float32).astype(dtype)

    return Weights(CONFIG, dict.fromkeys(declared, dtype), read)


@pytest.fixture
def store(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    yield checkpoints
    checkpoints.close()


def stored(store: Checkpoints, step: int, path: str) -> ts.TensorStore:
    base = {"driver": "file", "path": f"{store.directory / str(step) / 'parameters'}/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
    return ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_what_is_streamed_is_restored_like_any_other(store, dtype):
    weights = random_weights(dtype)
    store.save_weights(7, weights, {"step": 7, "stage": "imported"})
    assert store.steps() == [7] and store.metadata(7) == {"step": 7, "stage": "imported"}
    restored = flat(store.parameters(7))
    assert restored.keys() == weights.specs.keys()
    for path, layer in weights.slices():
        found = restored[path] if layer is None else restored[path][layer]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), weights.read(path, layer))
    assert not store.has_optimizer(7) and store.position(7) is None


def test_it_is_restored_into_another_type(store):
    """As a branch does: what was imported in 16 bits goes on in 32."""
    store.save_weights(0, random_weights(BFLOAT16), {})
    abstract = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=jnp.zeros(()).sharding),
        specs(CONFIG),
        is_leaf=lambda leaf: isinstance(leaf, ParamSpec),
    )
    restored = flat(store.parameters(0, abstract))
    exact = cast(random_weights(BFLOAT16), FLOAT32)
    assert {leaf.dtype for leaf in restored.values()} == {FLOAT32}
    np.testing.assert_array_equal(restored["layers/gate"][5], exact.read("layers/gate", 5))


def test_slices_come_back_one_by_one(store):
    weights = random_weights()
    store.save_weights(1, weights, {})
    back = store.weights(1, CONFIG)
    assert back.dtypes == weights.dtypes
    for path, layer in weights.slices():
        np.testing.assert_array_equal(back.read(path, layer), weights.read(path, layer))


def test_one_layer_reads_alone_whoever_wrote_it(store):
    store.save_weights(1, random_weights(), {})
    store.save(2, random_weights().tree(), {"count": np.int32(0)}, {"sequences": 0}, {})
    store.wait()
    for step in (1, 2):
        for path, spec in flat(specs(CONFIG)).items():
            if path.startswith("layers/"):
                assert stored(store, step, path).chunk_layout.read_chunk.shape == (1, *spec.shape[1:])


@pytest.mark.parametrize(
    ("shape", "layered", "chunk"),
    [
        ((40, 2304, 5760), True, [1, 2304, 5760]),  # 26.5 MB
        ((40, 2304), True, [1, 2304]),
        ((122753, 2304), False, [14563, 2304]),  # 64 MiB
        ((2304,), False, [2304]),
        ((2, 2**27), False, [1, 2**27]),  # a row is never cut
    ],
)
def test_chunks(shape, layered, chunk):
    axes = ("layers" if layered else "vocabulary", *[""] * (len(shape) - 1))
    assert chunk_shape(ParamSpec(shape, "matrix", axes), BFLOAT16) == chunk


def test_never_more_than_a_slice_of_each_parameter_is_in_memory(store):
    weights, alive, most = random_weights(), set(), 0

    def read(path: str, layer: int | None) -> np.ndarray:
        nonlocal most
        array = weights.read(path, layer)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        most = max(most, len(alive))
        return array

    store.save_weights(1, replace(weights, read=read), {})
    slices, parameters = len(list(weights.slices())), len(weights.specs)
    assert 1 < most <= 2 * parameters < slices  # one that is being written, one that has just been read


def test_a_slice_that_cannot_be_read_leaves_no_checkpoint(store):
    def read(path: str, layer: int | None) -> np.ndarray:
        if layer == 3:
            raise UserError("layer 3 is gone")
        return random_weights().read(path, layer)

    with pytest.raises(UserError, match="layer 3 is gone"):
        store.save_weights(1, replace(random_weights(), read=read), {})
    assert store.steps() == []
    store.save_weights(1, random_weights(), {})
    assert store.steps() == [1]


def test_another_shape_is_refused(store):
    store.save_weights(1, random_weights(), {})
    with pytest.raises(UserError, match=r"layers/down is \(12, 24, 16\); the model of the run has \(12, 32, 16\)"):
        store.weights(1, replace(CONFIG, feed_forward=32)).read("layers/up", 0)
