"""The table of names against what parameters there are, and what is said of tensors that do not fit."""

from __future__ import annotations

import dataclasses

import golden_models
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from cpmjax.formats.gguf_files import open_gguf
from cpmjax.formats.named_tensors import named_tensors, weights_of
from cpmjax.formats.names import TABLE, places
from cpmjax.formats.tensors import TensorInfo, Tensors
from cpmjax.model.parameters import flat, specs
from cpmjax.model.weights import DTYPES
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

FORMATS = ("huggingface", "gguf")
SMALL = ModelConfig(vocabulary=20, width=16, layers=2, heads=4, kv_heads=2, feed_forward=24)
HEAD = {"huggingface": "lm_head.weight", "gguf": "output.weight"}


class InMemory(Tensors):
    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        infos = {name: TensorInfo(array.shape, array.dtype, str(array.dtype)) for name, array in arrays.items()}
        super().__init__("a.file", infos)
        self.arrays = arrays

    def read(self, name):
        return self.arrays[name]


def tensors(config=SMALL, format="huggingface", dtype=np.float32) -> dict[str, np.ndarray]:
    """Those of a file, every number in them another."""
    found, start = {}, 0
    for place in places(config, format):
        size = int(np.prod(place.shape))
        found[place.name] = np.arange(start, start + size).reshape(place.shape).astype(dtype)
        start += size
    return found


def refusal(arrays, config=SMALL, format="huggingface") -> str:
    with pytest.raises(UserError) as caught:
        weights_of(InMemory(arrays), config, format)
    message = str(caught.value)
    assert message.startswith("a.file: ") and "; expected " in message and "\n" not in message, message
    return message


@pytest.mark.smoke
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_covers_exactly_the_declared_parameters(tied):
    config = dataclasses.replace(SMALL, tied=tied)
    declared = set(flat(specs(config)))
    assert declared == {entry.path for entry in TABLE} - ({"head"} if tied else set())
    for format in FORMATS:
        found = [(place.path, place.layer) for place in places(config, format)]
        stacked = {path for path in declared if path.startswith("layers/")}
        expected = {(path, layer) for path in stacked for layer in range(2)} | {
            (path, None) for path in declared - stacked
        }
        assert len(found) == len(set(found)) and set(found) == expected
        names = [place.name for place in places(config, format)]
        assert len(names) == len(set(names))


def test_names_are_those_of_real_files():
    file = golden_models.GOLDEN / "minicpm-tiny-a/model.safetensors"
    config = golden_models.config("minicpm-tiny-a")
    assert {place.name: place.shape for place in places(config, "huggingface")} == {
        name: array.shape for name, array in load_file(file).items()
    }
    real = open_gguf(golden_models.folder("minicpm-tiny-gguf") / "model-f16.gguf")
    config = ModelConfig(vocabulary=503, width=256, layers=2, heads=4, kv_heads=2, feed_forward=256)
    assert {place.name: place.shape for place in places(config, "gguf")} == {n: info.shape for n, info in real.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_both_ways_are_inverse(format, tied, dtype):
    config = dataclasses.replace(SMALL, tied=tied, head_width=6)
    arrays = tensors(config, format, dtype)
    weights = weights_of(InMemory(arrays), config, format)
    back = {place.name: array for place, array in named_tensors(weights, format)}
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


def test_matrices_are_transposed_and_vectors_are_not():
    arrays = tensors()
    weights = weights_of(InMemory(arrays), SMALL, "huggingface")
    np.testing.assert_array_equal(weights.read("layers/down", 1), arrays["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(weights.read("layers/key", 0), arrays["model.layers.0.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(weights.read("embedding", None), arrays["model.embed_tokens.weight"])


def test_gguf_has_the_halves_of_each_head_side_by_side():
    """Row 2j of a head in GGUF is its row j, row 2j + 1 its row j + half; each head on its own, keys by their heads."""
    arrays = tensors(format="gguf")
    weights = weights_of(InMemory(arrays), SMALL, "gguf")
    for path, name, heads in (("query", "attn_q", 4), ("key", "attn_k", 2)):
        ours, theirs = weights.read(f"layers/{path}", 1).T, arrays[f"blk.1.{name}.weight"]
        for head in range(heads):
            for j in range(2):
                np.testing.assert_array_equal(theirs[head * 4 + 2 * j], ours[head * 4 + j])
                np.testing.assert_array_equal(theirs[head * 4 + 2 * j + 1], ours[head * 4 + 2 + j])
    np.testing.assert_array_equal(weights.read("layers/value", 1).T, arrays["blk.1.attn_v.weight"])


# What does not fit.


@pytest.mark.parametrize("format", FORMATS)
def test_missing_and_unknown_tensors_are_listed(format):
    arrays = tensors(format=format)
    missing = [*arrays][:6:5]
    message = refusal({k: v for k, v in arrays.items() if k not in missing} | {"a.bias": np.zeros(3)}, format=format)
    assert f"lacks {', '.join(missing)} and has a.bias" in message
    assert "the 20 tensors of a MiniCPM of 2 layers, width 16, vocabulary 20, head tied" in message


def test_a_long_list_is_cut():
    arrays = tensors(dataclasses.replace(SMALL, layers=30))
    assert "and 246 more; expected the 20 tensors" in refusal(arrays)


def test_a_head_that_is_missing():
    assert "lacks lm_head.weight; expected" in refusal(tensors(), dataclasses.replace(SMALL, tied=False))


def test_another_shape():
    arrays = tensors() | {"model.layers.1.mlp.up_proj.weight": np.zeros((16, 24), np.float32)}
    assert "model.layers.1.mlp.up_proj.weight is 16 x 24; expected 24 x 16" in refusal(arrays)
    assert "model.norm.weight is a number; expected 16" in refusal(tensors() | {"model.norm.weight": np.float32(1)})


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.int64])
def test_another_type(dtype):
    arrays = tensors()
    arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(dtype)
    assert f"model.norm.weight holds {np.dtype(dtype)}; expected float32" in refusal(arrays)


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_beside_a_tied_embedding_must_equal_it(format):
    arrays = tensors(format=format)
    embedding = next(iter(arrays))
    weights = weights_of(InMemory(arrays | {HEAD[format]: arrays[embedding].copy()}), SMALL, format)
    assert "head" not in weights.dtypes
    other = arrays[embedding].copy()
    other[7, 3] += 1
    message = refusal(arrays | {HEAD[format]: other}, format=format)
    assert f"{HEAD[format]} differs from {embedding}" in message
    if format == "huggingface":
        assert "tie_word_embeddings false" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_inverse_frequencies_that_rope_theta_says_already(dtype):
    # By the formula of the paper on rotary embeddings, one a pair of a head of width 4.
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": np.array([1.0, 0.01]).astype(dtype) for n in range(2)}
    weights = weights_of(InMemory(tensors() | buffers), SMALL, "huggingface")
    assert set(weights.dtypes) == set(flat(specs(SMALL)))
    assert "rope_theta = 1e+06" in refusal(tensors() | buffers, dataclasses.replace(SMALL, rope_theta=1e6))
    short = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, dtype)}
    assert "inv_freq is not that of rope_theta = 10000" in refusal(tensors() | short)
