"""What the metadata of a GGUF file says of a model: files of llama.cpp, old files, ours, and files made to harm."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import golden_models
import numpy as np
import pytest
from gguf import GGUFReader

import cpmjax
from cpmjax.formats.exporting import export_gguf
from cpmjax.formats.fold import as_llama
from cpmjax.formats.gguf_files import GgmlType, GgufFile, open_gguf, write_gguf
from cpmjax.formats.gguf_model import model_metadata, read_config, read_tokenizer, scale_findings, short
from cpmjax.formats.loading import Stored, open_stored
from cpmjax.formats.tensors import TensorInfo
from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

SMALL = ModelConfig(vocabulary=20, width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, dim_model_base=4)
SCALES = ("embedding_scale", "residual_scale", "logit_scale")


def file(config: ModelConfig = SMALL, *without: str, **changes) -> GgufFile:
    """The file of a model, with other keys (of `minicpm.` unless they have a dot) and without some; no tensors read."""
    metadata = model_metadata(config, "a")
    named = {
        key if "general" in key or "tokenizer" in key else f"minicpm.{key}": value for key, value in changes.items()
    }
    metadata = {key: value for key, value in (metadata | named).items() if key.removeprefix("minicpm.") not in without}
    infos = {"token_embd.weight": TensorInfo((config.vocabulary, config.width), np.dtype(np.float32), "F32")}
    if not config.tied:
        infos["output.weight"] = infos["token_embd.weight"]
    return GgufFile(Path("a.gguf"), metadata, infos, {})


def refusal(*arguments, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read_config(file(*arguments, **changes))
    message = str(caught.value)
    assert message.startswith("a.gguf: ") and "; expected " in message and len(message) < 300, message
    return message.removeprefix("a.gguf: ")


# Files of llama.cpp.


@pytest.mark.parametrize("quantisation", ["f16", "q8_0", "q4_k_m"])
def test_a_file_of_its_converter(quantisation):
    config, notes = read_config(open_gguf(golden_models.folder("minicpm-tiny-gguf") / f"model-{quantisation}.gguf"))
    expected = ModelConfig(
        vocabulary=503, width=256, layers=2, heads=4, kv_heads=2, feed_forward=256, context=512, dim_model_base=64
    )
    assert config == expected and notes == []


def test_the_keys_of_its_converter_are_those_we_write(tmp_path):
    folder = golden_models.folder("minicpm-tiny-gguf")
    theirs = open_gguf(folder / "model-f16.gguf").metadata
    export_gguf(open_stored(folder), tmp_path / "a.gguf")
    ours = open_gguf(tmp_path / "a.gguf").metadata
    shared = {key for key in theirs if key.startswith("minicpm.")}
    assert shared >= {"minicpm.block_count", "minicpm.logit_scale", "minicpm.attention.head_count_kv"}
    for key in shared:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-7), key
    assert ours["general.file_type"] == theirs["general.file_type"] == 1


def test_the_library_of_llama_cpp_reads_what_we_write(tmp_path):
    stored = open_stored(golden_models.folder("minicpm-tiny-gqa"))
    export_gguf(stored, tmp_path / "a.gguf", quantisation="q8_0")
    reader = GGUFReader(tmp_path / "a.gguf")
    field = reader.get_field("minicpm.logit_scale")
    assert field is not None and field.contents() == 4.0
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    # Rows of 144 are no whole number of blocks of 32; norms are vectors.
    assert set(types.values()) == {"F16", "F32"}
    assert types["token_embd.weight"] == "F16" and types["blk.3.attn_norm.weight"] == "F32"


# The three scales.


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm-1b", "minicpm-2b-128k"])
def test_scales_of_the_released_models(name):
    config = ModelConfig(**PRESETS[name])
    metadata = model_metadata(config, name)
    assert metadata["minicpm.embedding_scale"] == 12.0
    assert metadata["minicpm.residual_scale"] == pytest.approx(1.4 / math.sqrt(config.layers), rel=1e-12)
    assert metadata["minicpm.logit_scale"] == config.width / 256  # llama.cpp divides by it
    found, notes = read_config(file(config))
    assert notes == [] and found == dataclasses.replace(config, kv_heads=config.kv)


def test_an_old_file_gets_the_scales_of_the_release_and_a_warning():
    config = dataclasses.replace(ModelConfig(**PRESETS["minicpm-2b"]), vocabulary=30)
    found, notes = read_config(file(config, *SCALES))
    assert found == dataclasses.replace(config, kv_heads=36)
    lacking, sharper = notes
    assert lacking == (
        "lacks minicpm.embedding_scale, minicpm.residual_scale, minicpm.logit_scale: taken as in the release"
    )
    assert "81 times too sharp" in sharper


@pytest.mark.parametrize("missing", SCALES)
def test_one_scale_that_is_missing(missing):
    config = dataclasses.replace(SMALL, width=512, dim_model_base=256)
    found, notes = read_config(file(config, missing))
    assert found == config
    assert notes[0] == f"lacks minicpm.{missing}: taken as in the release"
    assert len(notes) == 1 + (missing == "logit_scale")


def test_an_old_file_is_loaded_with_the_logits_of_the_release(tmp_path):
    """A model whose constants are the released ones, in a file without them."""
    config = ModelConfig(vocabulary=20, width=32, layers=2, heads=4, feed_forward=24)
    source = file(config)
    shapes = {"token_embd.weight": (20, 32), "output_norm.weight": (32,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{name}.weight": (32, 32) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}.weight": (24, 32) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (32, 24)
    infos = {name: (shape, GgmlType.F32) for name, shape in shapes.items()}
    models = []
    for name, without in (("new", ()), ("old", SCALES)):
        draw = np.random.default_rng(0)
        metadata = {k: v for k, v in source.metadata.items() if k.removeprefix("minicpm.") not in without}
        write_gguf(tmp_path / name, metadata, infos, (draw.normal(size=shape) for shape in shapes.values()))
        models.append(cpmjax.load(tmp_path / name))
    tokens = np.arange(20, dtype=np.int32)[None]
    np.testing.assert_array_equal(*(model(tokens) for model in models))


def test_an_inverted_scale_of_logits_is_found():
    wide = dataclasses.replace(SMALL, width=2304, heads=36, kv_heads=36, dim_model_base=256)
    (said,) = scale_findings(file(wide, logit_scale=256 / 2304))
    assert "minicpm.logit_scale = 0.1111 is inverted" in said and "81 times too sharp" in said
    assert scale_findings(file(wide)) == []


@pytest.mark.parametrize("base", [1, 3, 7, 36, 64, 255, 256, 300, 2304])
@pytest.mark.parametrize("width", [16, 144, 1536, 2304])
def test_constants_survive_float32(width, base):
    """The file holds quotients in float32; what was meant comes back."""
    config = dataclasses.replace(SMALL, width=width, layers=40, scale_depth=1.4, scale_emb=0.3, dim_model_base=base)
    metadata = model_metadata(config, "a")
    stored = {key: float(np.float32(metadata[f"minicpm.{key}"])) for key in SCALES}
    found, _ = read_config(file(config, **stored))
    assert (found.dim_model_base, found.scale_depth, found.scale_emb) == (base, 1.4, 0.3)


@pytest.mark.parametrize(("stored", "meant"), [(9.999999747378752e-06, 1e-5), (1e6, 1e6), (0.30000001192092896, 0.3)])
def test_the_shortest_decimal_of_a_float32(stored, meant):
    assert short(stored) == meant and np.float32(meant) == np.float32(stored)


# What else a file says.


@pytest.mark.parametrize("changes", [
    {"tied": False},
    {"head_width": 6},
    {"rope_scaling": "linear", "rope_factor": 3.0},
    {"rope_scaling": "dynamic", "rope_factor": 4.0, "rope_theta": 1e6},
    {"norm_epsilon": 1e-6, "context": 7, "kv_heads": 4},
], ids=str)  # fmt: skip
def test_written_and_read(changes):
    config = dataclasses.replace(SMALL, **changes)
    assert read_config(file(config)) == (config, [])


def test_what_may_be_missing():
    assert read_config(file(SMALL, "attention.head_count_kv"))[0].kv == 4
    assert read_config(file(SMALL, "rope.freq_base", "rope.dimension_count", "vocab_size"))[0] == SMALL


def test_a_llama_has_no_multipliers():
    config = as_llama(SMALL, tied=True)
    source = file(config)
    metadata = {key.replace("minicpm.", "llama."): value for key, value in source.metadata.items()}
    llama = GgufFile(Path("a.gguf"), metadata | {"general.architecture": "llama"}, dict(source.items()), {})
    assert read_config(llama) == (config, [])
    assert scale_findings(llama) == []


def test_no_vocabulary_is_no_tokenizer():
    assert read_tokenizer(file()) is None
    assert read_tokenizer(file(**{"tokenizer.ggml.model": "none"})) is None


def test_dynamic_scaling_is_said_to_be_beyond_llama_cpp(tmp_path):
    stored = open_stored(golden_models.folder("minicpm-tiny-a"))
    config = dataclasses.replace(stored.weights.config, rope_scaling="dynamic", rope_factor=4.0)
    weights = dataclasses.replace(stored.weights, config=config)
    said = export_gguf(Stored(weights, None), tmp_path / "a.gguf")
    assert "llama.cpp has no dynamic NTK: it is exact up to 4096 tokens, and not beyond" in said
    assert not any("rope.scaling" in key for key in open_gguf(tmp_path / "a.gguf").metadata if "minicpm." in key)


# What is refused.


@pytest.mark.parametrize("key", [
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length",
    "attention.layer_norm_rms_epsilon",
])  # fmt: skip
def test_a_shape_that_is_missing(key):
    assert refusal(SMALL, key) == f"lacks minicpm.{key}; expected the shape of the model"


@pytest.mark.parametrize(("changes", "message"), [
    ({"general.architecture": "minicpm3"}, "general.architecture = 'minicpm3'; expected minicpm or llama"),
    ({"general.architecture": np.arange(3)}, "general.architecture is of type ndarray; expected a string"),
    ({"rope.dimension_count": 2}, "rope.dimension_count = 2; expected the width of a head, 4"),
    ({"rope.scaling.type": "yarn"}, "rope.scaling.type = 'yarn' is not supported; expected none or linear"),
    ({"rope.scaling.type": ["linear"]}, "minicpm.rope.scaling.type is of type list; expected a string"),
    ({"rope.scaling.type": "linear"}, "lacks minicpm.rope.scaling.factor; expected"),
    ({"logit_scale": 3.0}, "minicpm.logit_scale = 3; expected the width, 16, over a whole number"),
    ({"logit_scale": 1000.0}, "minicpm.logit_scale = 1000; expected the width, 16, over a whole number"),
    ({"attention.head_count_kv": 3}, "attention.head_count_kv = 3; expected a divisor of model.heads = 4"),
    ({"block_count": 0}, "block_count = 0; expected a positive whole number"),
    ({"rope.freq_base": -1.0}, "rope.freq_base = -1.0; expected a positive number"),
])  # fmt: skip
def test_what_we_do_not_compute(changes, message):
    assert message in refusal(SMALL, **changes)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e300, True, "12", np.ones(2)], ids=str)
@pytest.mark.parametrize("key", SCALES)
def test_hostile_scales(key, value):
    assert key in refusal(SMALL, **{key: value}).partition(";")[0]


@pytest.mark.parametrize("value", [True, "2", 2.0, 2**63, 2**60, -(2**31), np.arange(2)], ids=str)
@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count", "context_length"])
def test_hostile_counts(key, value):
    refusal(SMALL, **{key: value})


def test_an_embedding_that_is_missing_or_no_matrix():
    whole = file()
    for infos in ({}, {"token_embd.weight": TensorInfo((20,), np.dtype(np.float32), "F32")}):
        with pytest.raises(UserError, match=r"lacks token_embd.weight; expected a matrix with a row a token"):
            read_config(GgufFile(whole.path, whole.metadata, infos, {}))
