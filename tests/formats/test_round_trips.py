"""Every conversion has an inverse: what comes back is the same, bit for bit, or within the one rounding of a fold."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import golden_models
import jax
import jobs
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import cpmjax
from cpmjax.convert import convert
from cpmjax.formats.exporting import export_gguf, export_huggingface, export_llama
from cpmjax.formats.fold import Constants, as_llama, fold, unfold
from cpmjax.formats.loading import Stored, load_tokenizer, open_stored, recognise
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.model.weights import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Weights, slice_shape
from cpmjax.run.config import ModelConfig
from cpmjax.train import main as train

A, GQA, GGUF, HISTORY = (f"minicpm-tiny-{name}" for name in ("a", "gqa", "gguf", "history"))
SMALL = ModelConfig(vocabulary=60, width=32, layers=3, heads=4, kv_heads=2, feed_forward=48, dim_model_base=8)


def raw(folder: Path) -> dict[str, tuple]:
    """Every tensor of the safetensors files of a folder as (type, shape, bytes), read by their own library."""
    files = [safetensors.deserialize(file.read_bytes()) for file in folder.glob("*.safetensors")]
    return {name: (info["dtype"], info["shape"], bytes(info["data"])) for file in files for name, info in file}


def random_weights(config: ModelConfig, dtype: np.dtype = FLOAT32, seed: int = 0) -> Weights:
    """Any finite numbers, tiny ones and zeros among them; the same at every reading."""
    declared = flat(specs(config))

    def read(path: str, layer: int | None) -> np.ndarray:
        draw = np.random.default_rng([seed, *path.encode(), 0 if layer is None else layer + 1])
        shape = slice_shape(declared[path])
        numbers = draw.normal(size=shape) * 10.0 ** draw.integers(-4, 2, shape)
        return (numbers * (draw.random(shape) < 0.98)).astype(np.float32).astype(dtype)

    return Weights(config, dict.fromkeys(declared, dtype), read)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.dtypes == expected.dtypes and found.specs == expected.specs
    for path, layer in expected.slices():
        a, b = found.read(path, layer), expected.read(path, layer)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), (path, layer)


def ulps(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest distance, in units of the last place."""
    return float(np.max(np.abs(found - expected) / np.spacing(np.abs(expected))))


# Hugging Face and the run.


@pytest.mark.parametrize("name", [A, GQA, GGUF], ids=["f32", "bf16", "f16"])
def test_huggingface_to_a_run_and_back_changes_no_bit(tmp_path, name):
    convert(golden_models.folder(name), tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert raw(tmp_path / "hf") == raw(golden_models.folder(name))


@pytest.mark.parametrize("name", [A, GQA])
def test_shards_come_back_as_one_file(tmp_path, name):
    stored = open_stored(golden_models.folder(name))
    export_huggingface(stored, tmp_path / "shards", shard_bytes=300_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    convert(tmp_path / "shards", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert raw(tmp_path / "shards") == raw(tmp_path / "hf") == raw(golden_models.folder(name))


def test_each_kind_of_parameter_keeps_its_type(tmp_path):
    weights = random_weights(SMALL)
    types = {path: BFLOAT16 if "norm" in path else FLOAT16 for path in weights.dtypes} | {"embedding": FLOAT32}
    mixed = dataclasses.replace(
        weights, dtypes=types, read=lambda path, layer: weights.read(path, layer).astype(types[path])
    )
    export_huggingface(Stored(mixed, None), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "again", "hf")
    assert_equal(open_stored(tmp_path / "run").weights, mixed)
    assert raw(tmp_path / "again") == raw(tmp_path / "hf")
    assert {kind for kind, _, _ in raw(tmp_path / "hf").values()} == {"BF16", "F16", "F32"}


def test_layers_of_different_types_are_stored_in_the_type_that_holds_them(tmp_path):
    export_huggingface(Stored(random_weights(SMALL, FLOAT16), None), tmp_path / "hf")
    kinds = {"F16": np.float16, "F32": np.float32}
    tensors = {
        name: np.frombuffer(data, kinds[kind]).reshape(shape)
        for name, (kind, shape, data) in raw(tmp_path / "hf").items()
    }
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) * np.float32(1.1)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "again", "hf")
    found = raw(tmp_path / "again")
    for name, array in tensors.items():
        kind = "F32" if "up_proj" in name else "F16"
        assert found[name] == (kind, [*array.shape], array.astype(kinds[kind]).tobytes())


@pytest.mark.parametrize("layout", ["zip", "legacy", "shards"])
def test_files_of_torch(tmp_path, layout):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    load_file = pytest.importorskip("safetensors.torch").load_file
    source = golden_models.folder(GQA)
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    if layout == "shards":
        names = sorted(tensors)
        parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, tmp_path / "hf" / file)
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        # As older releases have it: the head beside the embedding, in the same storage.
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        file = tmp_path / "hf/pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=layout == "zip")
    convert(tmp_path / "hf", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert raw(tmp_path / "back") == raw(source)


KEYS_128K = {
    "vocab_size": 512,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "dynamic", "factor": 4.0},
    "max_position_embeddings": 65536,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
ADDED = [
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|x|>",
]


@pytest.fixture(scope="module")
def like_128k(tmp_path_factory):
    """A folder like MiniCPM-2B-128k: head apart, dynamic NTK, seven added tokens, more rows than tokens."""
    folder = tmp_path_factory.mktemp("128k") / "hf"
    config = ModelConfig(
        vocabulary=512, width=32, layers=2, heads=4, feed_forward=48, dim_model_base=8, tied=False, context=65536,
        rope_theta=1e6, rope_scaling="dynamic", rope_factor=4.0,
    )  # fmt: skip
    export_huggingface(Stored(random_weights(config, BFLOAT16), None), folder)
    tokens = {text: 503 + number for number, text in enumerate(ADDED)}
    shutil.copy(golden_models.folder(HISTORY) / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    settings = {"chat_template": "{{ messages }}", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("way", [["run", "hf"], ["hf"], ["gguf", "run", "hf"]])
def test_what_is_like_the_model_of_128k_tokens(tmp_path, like_128k, way):
    source = like_128k
    for number, to in enumerate(way):
        convert(source, tmp_path / f"{number}", to, dtype="bf16" if to == "hf" else None)
        source = tmp_path / f"{number}"
    assert raw(source) == raw(like_128k)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (source, like_128k))
    # GGUF has no place for what only a new model needs.
    assert config == before | ({"initializer_range": 0.1} if "gguf" in way else {})
    assert config.items() >= KEYS_128K.items()
    found, expected = load_tokenizer(source), load_tokenizer(like_128k)
    assert found.settings == expected.settings and list(found.added_tokens) == ADDED
    texts = ["", "a model", "  two  spaces", "<|im_start|>user\nHi<|im_end|>", "<|x|><|x|> 你好"]
    assert [found.encode(text) for text in texts] == [expected.encode(text) for text in texts]


def test_a_tokenizer_of_a_folder_comes_back_byte_for_byte(tmp_path):
    source = golden_models.folder(HISTORY)
    convert(source, tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert load_tokenizer(tmp_path / "hf").settings == load_tokenizer(tmp_path / "run").settings


@pytest.mark.parametrize("length", [0x0180, 0x4B50, 0x7F80])
def test_a_header_whose_length_looks_like_torch_is_still_one_of_safetensors(tmp_path, length):
    """0x80 begins a pickle, 0x4b50 is the PK of a zip file; one header in 32 has such a length."""
    export_huggingface(Stored(random_weights(SMALL), None), tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    head, body = file.read_bytes()[8 : 8 + size], file.read_bytes()[8 + size :]
    length += 0x10000 if length < size else 0
    file.write_bytes(length.to_bytes(8, "little") + head.ljust(length) + body)
    assert recognise(file) == "safetensors"
    assert_equal(open_stored(tmp_path / "hf").weights, random_weights(SMALL))


# GGUF.


@pytest.mark.parametrize("name", [A, GQA, GGUF])
def test_a_run_to_gguf_and_back(tmp_path, name):
    convert(golden_models.folder(name), tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "a.gguf", "gguf", dtype="f32")
    dtype = open_stored(tmp_path / "run").weights.dtype_names()
    convert(tmp_path / "a.gguf", tmp_path / "again", "run", dtype=dtype)
    assert_equal(open_stored(tmp_path / "again").weights, open_stored(tmp_path / "run").weights)
    assert cpmjax.load(tmp_path / "again").config == cpmjax.load(tmp_path / "run").config


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_gguf_in_sixteen_bits_keeps_matrices_and_widens_norms(tmp_path, dtype):
    weights = random_weights(SMALL, DTYPES[dtype])
    export_gguf(Stored(weights, None), tmp_path / "a.gguf")
    found = open_stored(tmp_path / "a.gguf").weights
    assert {path for path, stored in found.dtypes.items() if stored == FLOAT32} == {
        "layers/attention_norm", "layers/feed_forward_norm", "final_norm"
    }  # fmt: skip
    for path, layer in weights.slices():
        np.testing.assert_array_equal(found.read(path, layer), weights.read(path, layer).astype(found.dtypes[path]))


@st.composite
def shapes(draw, head_width_free=False):
    """Few heads and layers in every proportion; with `head_width_free` heads may be wider or narrower than usual."""
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, head = kv_heads * groups, 2 * draw(st.integers(1, 5))
    width = draw(st.integers(1, 40)) if head_width_free else heads * head
    return ModelConfig(
        vocabulary=draw(st.integers(1, 70)),
        width=width,
        layers=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head if head * heads != width else None,
        feed_forward=draw(st.integers(1, 80)),
        tied=draw(st.booleans()),
        context=draw(st.integers(1, 10**6)),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 3e-4])),
        rope_theta=draw(st.sampled_from([1e4, 1e6, 5e5])),
        rope_scaling=draw(st.sampled_from(["none", "linear", "dynamic"])),
        rope_factor=draw(st.sampled_from([2.0, 4.0, 32.0])),
        scale_emb=draw(st.sampled_from([1.0, 12.0, 0.3])),
        scale_depth=draw(st.sampled_from([1.4, 1.0, 0.37])),
        dim_model_base=draw(st.integers(1, 300)),
    )


few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def normal(config: ModelConfig) -> ModelConfig:
    """As files say it: key-value heads always, a factor only of a scaling."""
    factor = 1.0 if config.rope_scaling == "none" else config.rope_factor
    return dataclasses.replace(config, kv_heads=config.kv, rope_factor=factor)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_any_shape_comes_back(to):
    @few
    @given(shapes(head_width_free=to == "gguf"), st.sampled_from([FLOAT32, BFLOAT16]))
    def check(config, dtype):
        weights = random_weights(config, FLOAT32 if to == "gguf" else dtype)
        with tempfile.TemporaryDirectory() as folder:
            (export_huggingface if to == "hf" else export_gguf)(Stored(weights, None), Path(folder) / "model")
            found = open_stored(Path(folder) / "model").weights
            assert_equal(found, weights)
        assert found.config == normal(config)

    check()


@settings(parent=few)
@given(shapes(head_width_free=True))
def test_any_llama_comes_back(config):
    config = as_llama(config, config.tied)
    weights = random_weights(config)
    with tempfile.TemporaryDirectory() as folder:
        export_llama(Stored(weights, None), Path(folder) / "llama")
        found = open_stored(Path(folder) / "llama").weights
        assert_equal(found, weights)
    assert found.config == normal(config)


# The fold.


@settings(parent=few)
@given(shapes(), st.floats(0.01, 100), st.floats(0.01, 10), st.integers(1, 3000))
def test_folded_and_unfolded_is_within_one_rounding(config, scale_emb, scale_depth, base):
    known = Constants(scale_emb, scale_depth, base)
    weights = random_weights(known.of(config))
    found = unfold(fold(weights), known)
    assert found.config == weights.config  # tied where it was, and only there
    for path, layer in weights.slices():
        expected = weights.read(path, layer)
        nonzero = expected != 0
        assert not found.read(path, layer)[~nonzero].any()
        assert ulps(found.read(path, layer)[nonzero], expected[nonzero]) <= 1 if nonzero.any() else True


@pytest.mark.parametrize("name", [A, GQA])
def test_huggingface_to_llama_and_back(tmp_path, name):
    convert(golden_models.folder(name), tmp_path / "llama", "llama", dtype="f32")
    constants = Constants(12, 1.4, 36)
    convert(tmp_path / "llama", tmp_path / "hf", "hf", constants=constants)
    found, expected = open_stored(tmp_path / "hf").weights, open_stored(golden_models.folder(name)).weights
    assert found.config == expected.config and found.config.tied
    assert "lm_head.weight" in raw(tmp_path / "llama") and "lm_head.weight" not in raw(tmp_path / "hf")
    for path, layer in expected.slices():
        assert ulps(found.read(path, layer), expected.read(path, layer).astype(np.float32)) <= 1


# Runs of our own.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run that was trained here."""
    folder = tmp_path_factory.mktemp("trained")
    experiment = jobs.experiment(folder, "run", schedule={"type": "wsd", "warmup": 1, "stable": 3, "decay": 2})
    cache = jax.config.jax_compilation_cache_dir
    try:
        assert train([str(experiment)]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    return folder / "run"


def logits(path) -> np.ndarray:
    model = cpmjax.load(path)
    tokens = np.random.default_rng(0).integers(3, model.config.vocabulary, (2, 20), np.int32)
    return np.asarray(model(tokens))


@pytest.mark.slow
def test_a_run_trained_here_goes_out_and_comes_back(tmp_path, trained):
    right = cpmjax.load(trained)
    for to in ("hf", "gguf"):
        convert(trained, tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"{to} run", "run", steps=[jobs.steps_of(trained)[-1]])
        assert jobs.steps_of(tmp_path / f"{to} run") == jobs.steps_of(trained)[-1:]
        jax.tree.map(np.testing.assert_array_equal, cpmjax.load(tmp_path / f"{to} run").parameters, right.parameters)
        np.testing.assert_array_equal(logits(tmp_path / f"{to} run"), logits(trained))
        assert load_tokenizer(tmp_path / to).encode("some words") == load_tokenizer(trained).encode("some words")
    convert(trained, tmp_path / "llama", "llama")
    convert(tmp_path / "llama", tmp_path / "llama run", "run", constants=Constants(12, 1.4, 16))
    for path in ("llama", "llama run"):
        np.testing.assert_allclose(logits(tmp_path / path), logits(trained), atol=1e-5)
    assert cpmjax.load(tmp_path / "llama run").config == normal(right.config)


@pytest.mark.parametrize(("parametrisation", "width", "base"), [
    ("minicpm", 32, 8),
    ("minicpm_table7", 32, 8),
    ("standard", 32, 8),
    ("depth_mup", 176, 48),  # 176 * (48 / 176) is no whole number in floating point
    ("completep", 176, 48),
])  # fmt: skip
def test_every_parametrisation_goes_out_with_the_constants_that_compute_the_same(
    tmp_path, parametrisation, width, base
):
    config = ModelConfig(
        vocabulary=60, width=width, layers=3, heads=4, feed_forward=48, dim_model_base=base,
        layers_base=2, parametrisation=parametrisation,
    )  # fmt: skip
    tree = initialise(config, jax.random.key(1))
    weights = Weights(
        config,
        dict.fromkeys(flat(specs(config)), FLOAT32),
        lambda path, layer: np.asarray(flat(tree)[path] if layer is None else flat(tree)[path][layer]),
    )
    tokens = np.random.default_rng(0).integers(0, 60, (2, 20), np.int32)
    right = np.asarray(MiniCPM(config, tree)(tokens))
    export_huggingface(Stored(weights, None), tmp_path / "hf")
    export_llama(Stored(weights, None), tmp_path / "llama")
    export_gguf(Stored(weights, None), tmp_path / "a.gguf")
    for name in ("hf", "llama", "a.gguf"):
        np.testing.assert_allclose(cpmjax.load(tmp_path / name)(tokens), right, atol=1e-5)
