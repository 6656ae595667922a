"""The muP constants in the weights of a Llama and out again, against the formulas of the release."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cpmjax.convert import convert
from cpmjax.formats.exporting import export_huggingface
from cpmjax.formats.fold import Constants, as_llama, constants, fold, unfold
from cpmjax.formats.loading import Stored, open_stored
from cpmjax.model import mup
from cpmjax.model.parameters import flat, specs
from cpmjax.model.weights import BFLOAT16, FLOAT16, FLOAT32, Weights, cast, slice_shape
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

SMALL = ModelConfig(vocabulary=30, width=16, layers=4, heads=2, feed_forward=24, dim_model_base=4)
KNOWN = Constants(12.0, 1.4, 4)


def random_weights(config: ModelConfig = SMALL, dtype: np.dtype = FLOAT32) -> Weights:
    declared = flat(specs(config))

    def read(path: str, layer: int | None) -> np.ndarray:
        draw = np.random.default_rng([*path.encode(), layer or 0])
        return draw.normal(size=slice_shape(declared[path])).astype(np.float32).astype(dtype)

    return Weights(config, dict.fromkeys(declared, dtype), read)


def scaled(array: np.ndarray, factor: float) -> np.ndarray:
    """In float32, rounded once to the type of the array."""
    return (array.astype(np.float32) * np.float32(factor)).astype(array.dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_multiplied_by_what(tied, dtype):
    weights = random_weights(dataclasses.replace(SMALL, tied=tied), dtype)
    folded = fold(weights)
    head = weights.read("embedding", None).T if tied else weights.read("head", None)
    factors = {"embedding": 12.0, "layers/output": 0.7, "layers/down": 0.7, "head": 0.25}  # 1.4 / sqrt(4); 4 / 16
    assert not folded.config.tied and folded.specs.keys() == folded.dtypes.keys()
    for path, layer in folded.slices():
        source = head if path == "head" else weights.read(path, layer)
        np.testing.assert_array_equal(folded.read(path, layer), scaled(source, factors.get(path, 1.0)))
        assert folded.read(path, layer).dtype == dtype


def test_a_llama_has_no_multipliers_left():
    assert tuple(mup.multipliers(fold(random_weights()).config)) == (1, 1, 1)
    assert fold(random_weights()).config == as_llama(SMALL, tied=False)


def test_a_model_without_multipliers_keeps_its_tied_head():
    weights = random_weights(as_llama(SMALL, tied=True))
    folded = fold(weights)
    assert folded.config.tied and "head" not in folded.dtypes
    for path, layer in weights.slices():
        np.testing.assert_array_equal(folded.read(path, layer), weights.read(path, layer))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_a_tied_head_is_found_again(dtype):
    unfolded = unfold(fold(random_weights(dtype=dtype)), KNOWN)
    assert unfolded.config == SMALL and "head" not in unfolded.dtypes


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16])
def test_a_head_of_its_own_stays_one(dtype):
    """It is what the embedding is, but for one number that is off by more than the roundings of a fold."""
    weights = random_weights(dataclasses.replace(SMALL, tied=False), dtype)

    def read(path, layer):
        if path != "head":
            return weights.read(path, layer)
        head = weights.read("embedding", None).T.copy()
        head[3, 5] = head[3, 5].astype(np.float32) * (1 + 8 * float(jnp.finfo(dtype).eps))
        return head

    unfolded = unfold(fold(dataclasses.replace(weights, read=read)), KNOWN)
    assert not unfolded.config.tied and "head" in unfolded.dtypes


def test_a_tied_llama_gets_a_head_of_its_own():
    """Its one matrix is embedding and head; by the constants they are two."""
    llama = random_weights(as_llama(SMALL, tied=True))
    unfolded = unfold(llama, KNOWN)
    assert unfolded.config == dataclasses.replace(SMALL, tied=False)
    embedding = llama.read("embedding", None)
    np.testing.assert_allclose(unfolded.read("embedding", None), embedding / 12, rtol=1e-6)
    np.testing.assert_allclose(unfolded.read("head", None), embedding.T * 4, rtol=1e-6)


def test_a_fold_into_a_wider_type_is_exact(tmp_path):
    """bf16 weights as a Llama in f32: the products are not rounded to bf16 on the way."""
    weights = random_weights(dtype=BFLOAT16)
    export_huggingface(Stored(weights, None), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "llama", "llama", dtype="f32")
    found, exact = open_stored(tmp_path / "llama").weights, fold(cast(weights, FLOAT32))
    for path, layer in exact.slices():
        np.testing.assert_array_equal(found.read(path, layer), exact.read(path, layer))
    rounded = fold(weights).read("layers/down", 0).astype(np.float32)
    assert not np.array_equal(rounded, exact.read("layers/down", 0))


def test_what_is_too_large_for_f16_is_named():
    weights = random_weights(dataclasses.replace(SMALL, scale_emb=1e6))
    with pytest.raises(UserError, match=r"^embedding: holds .*, too large for f16; expected --dtype bf16 or f32$"):
        cast(fold(weights), FLOAT16).read("embedding", None)


@pytest.mark.parametrize(("parametrisation", "expected"), [
    ("minicpm", Constants(12.0, 1.4, 4)),
    ("minicpm_table7", Constants(12.0, 1.4, 4)),
    ("standard", Constants(12.0, 1.4, 16)),  # logits as they are
    ("depth_mup", Constants(12.0, 1.4, 4)),
    ("completep", Constants(12.0, 1.4 * math.sqrt(2 / 4), 4)),  # branches fall with the depth, not with its root
])  # fmt: skip
def test_constants_of_each_parametrisation(parametrisation, expected):
    found = constants(dataclasses.replace(SMALL, parametrisation=parametrisation, layers_base=2))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-12)
    assert isinstance(found.dim_model_base, int)


def test_every_width_over_every_base_is_a_whole_number():
    """128 * (x / 128) is not always x: what floating point leaves over is no reason to refuse a model."""
    for width in range(16, 1025, 16):
        for base in range(16, 257, 16):
            config = dataclasses.replace(SMALL, width=width, dim_model_base=base, parametrisation="completep")
            assert constants(config).dim_model_base == base


@pytest.mark.parametrize("dtype", [None, FLOAT32])
@pytest.mark.parametrize("stored", [BFLOAT16, FLOAT16])
def test_a_fold_rounded_to_16_bits_unfolds_into_a_tied_model(stored, dtype):
    """The head agrees with the embedding to the roundings of the type that was folded in, not of the one asked for."""
    model = random_weights(SMALL, stored)
    back = unfold(fold(model), KNOWN, dtype)
    assert back.config == model.config and back.config.tied
    eps = float(ml_dtypes.finfo(stored).eps)
    for path, layer in model.slices():
        before, after = (np.float32(weights.read(path, layer)) for weights in (model, back))
        np.testing.assert_allclose(after, before, rtol=eps, atol=64 * float(ml_dtypes.finfo(stored).smallest_subnormal))
