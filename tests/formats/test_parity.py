"""Logits of the original PyTorch code, at every end of every way from one format to another; llama.cpp and
transformers read what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import golden_models
import jax
import numpy as np
import pytest
from formats.llama_cpp import LlamaCpp

import cpmjax
from cpmjax.convert import convert
from cpmjax.formats.exporting import export_gguf
from cpmjax.formats.fold import Constants
from cpmjax.formats.gguf_files import GgmlType, open_gguf, write_gguf
from cpmjax.formats.loading import open_stored

A, GQA, GGUF, HISTORY = (f"minicpm-tiny-{name}" for name in ("a", "gqa", "gguf", "history"))
CONSTANTS = {A: Constants(12, 1.4, 36), GQA: Constants(12, 1.4, 36), GGUF: Constants(12, 1.4, 64)}
# Long enough for wrongly rotated queries and keys to show.
PROMPTS = [[1, *np.random.default_rng(7).integers(3, 503, length - 1).tolist()] for length in (10, 17, 29, 60)]
ROTARY = {
    "theta1e6": {"rope_theta": 1e6},
    "linear2": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic4_theta1e6_max32": {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "dynamic4_max16": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
}


def through(way: str, source: Path, folder: Path, constants: Constants | None = None) -> Path:
    """The end of a way of conversions like "run > hf > gguf f16"; "mup" stands for the constants."""
    for number, step in enumerate(way.split(" > ") if way else []):
        to, *options = step.split()
        dtype, quantisation = None, None
        for option in options:
            dtype = option if option in ("f32", "f16", "bf16") else dtype
            quantisation = option if option in ("q8_0", "q4_0") else quantisation
        target = folder / f"{number}.{to}"
        known = constants if "mup" in options else None
        convert(source, target, to, dtype=dtype, quantisation=quantisation, constants=known)
        source = target
    return source


FORMATS = ["", "run", "hf", "llama f32", "gguf f32"]
WAYS = [
    "run > hf > run > hf",
    "run f32 > llama",
    "run > gguf f32 > run > hf",
    "gguf f32 > llama",
    "llama f32 > run",
    "llama f32 > run mup",
    "llama f32 > hf mup",
    "llama f32 > hf",
    "llama f32 > gguf > hf > run",
    "llama f32 > gguf > llama > hf mup > gguf",
]


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in (A, GQA, GGUF) for way in FORMATS] + [(GQA, way) for way in WAYS]
)
def test_logits_at_the_end_of_every_way(tmp_path, name, way):
    end = through(way, golden_models.folder(name), tmp_path, CONSTANTS[name])
    assert golden_models.difference(cpmjax.load(end), golden_models.expected(name)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "way"), [(GGUF, "gguf f16"), (GGUF, "run > gguf f16 > hf"), (GQA, "gguf bf16 > run"), (GQA, "hf bf16")]
)
def test_sixteen_bits_that_hold_the_weights_exactly_change_nothing(tmp_path, name, way):
    end = through(way, golden_models.folder(name), tmp_path)
    assert golden_models.difference(cpmjax.load(end), golden_models.expected(name)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "most"), [("f16", 0.02), ("bf16", 0.2)])
def test_sixteen_bits_that_do_not_move_logits_by_their_roundings(tmp_path, dtype, most):
    """f16 keeps 8 times as many digits as bf16."""
    numbers = golden_models.expected(A)
    files = (through(f"{to} {dtype}", golden_models.folder(A), tmp_path) for to in ("run", "hf", "llama", "gguf"))
    for difference in (golden_models.difference(cpmjax.load(file), numbers) for file in files):
        assert 1e-4 < difference.max() < most


@pytest.mark.parametrize("way", ["", "run > gguf", "run mup", "hf", "hf mup > gguf"])
def test_the_llama_of_others(tmp_path, way):
    end = through(way, golden_models.folder(f"{A}-llama"), tmp_path, CONSTANTS[A])
    assert golden_models.difference(cpmjax.load(end), golden_models.expected(A)).max() < 1e-4


@pytest.mark.parametrize("way", ["", "run > gguf f32"])
def test_a_bare_file_of_torch_with_the_head_beside_the_embedding(tmp_path, way):
    file = golden_models.MORE / A / "pytorch_model.bin"
    if not file.exists():
        pytest.skip(f"needs {file}")
    difference = golden_models.difference(cpmjax.load(through(way, file, tmp_path)), golden_models.expected(A))
    assert difference.max() < 1e-4


@pytest.mark.parametrize("way", ["", "run > llama f32"])
def test_a_file_of_llama_cpp_in_f16(tmp_path, way):
    end = through(way, golden_models.folder(GGUF) / "model-f16.gguf", tmp_path)
    assert golden_models.difference(cpmjax.load(end), golden_models.expected(GGUF)).max() < 1e-4


@pytest.mark.parametrize("way", ["", "run > gguf f32"])
@pytest.mark.parametrize(
    ("file", "logits", "most", "mean"),
    [
        ("model-q8_0.gguf", "logits", 0.4, 0.04),
        # llama.cpp rounds activations to 8 bits in these products, and we do not.
        ("model-q4_k_m.gguf", "logits_llamacpp_q4_k_m", 0.4, 0.07),
    ],
)
def test_a_quantised_file_of_llama_cpp(tmp_path, way, file, logits, most, mean):
    end = through(way, golden_models.folder(GGUF) / file, tmp_path)
    numbers = golden_models.expected(GGUF)
    difference = golden_models.difference(cpmjax.load(end), numbers, logits)
    assert difference.max() < most and difference.mean() < mean
    # The bounds tell apart: the logits of the weights before Q4_K_M are four times as far.
    apart = np.abs(numbers["logits"] - numbers["logits_llamacpp_q4_k_m"])
    assert apart.max() > 3 * most and apart.mean() > 3 * mean


def last_logits(model) -> np.ndarray:
    """[2, vocabulary]: at the end of the first two rows of the history's evaluation."""
    rows = golden_models.expected(HISTORY)["eval_input_ids"][:2].astype(np.int32)
    return np.asarray(model(rows))[:, -1]


@pytest.mark.parametrize("step", [300_000, 390_000])
def test_every_step_of_a_history(tmp_path, step):
    numbers = golden_models.expected(HISTORY)
    expected = numbers["last_position_logits"][list(numbers["steps"]).index(step)]
    source = golden_models.folder(HISTORY)
    convert(source, tmp_path / "run", "run")
    models = [cpmjax.load(source, step), cpmjax.load(tmp_path / "run", step)]
    for to, dtype in (("hf", None), ("llama", "f32"), ("gguf", "f32")):
        convert(tmp_path / "run", tmp_path / to, to, steps=[step], dtype=dtype)
        models.append(cpmjax.load(tmp_path / to))
    for model in models:
        np.testing.assert_allclose(last_logits(model), expected, atol=1e-4)


@pytest.mark.parametrize("way", ["run > hf", "gguf > llama > hf mup"])
@pytest.mark.parametrize("variant", ROTARY)
def test_rotary_variants(tmp_path, variant, way):
    source = changed_config(golden_models.folder(A), tmp_path / "source", **ROTARY[variant])
    numbers = golden_models.expected(A, "expected_rope_variants.npz")
    model = cpmjax.load(through(way, source, tmp_path, CONSTANTS[A]))
    found = np.asarray(model(numbers["input_ids"].astype(np.int32)))[0, -4:]
    np.testing.assert_allclose(found, numbers[f"last4_logits_{variant}"], atol=1e-4)


def changed_config(folder: Path, target: Path, **keys) -> Path:
    """A copy of a folder with other keys in its config.json."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    file.chmod(0o644)
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return target


# What others compute with what is written.


def transformers_logits(folder: Path, input_ids, attention_mask=None) -> np.ndarray:
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        return model(torch.tensor(input_ids), attention_mask=mask).logits.numpy()


@pytest.mark.slow  # for the import of transformers
@pytest.mark.parametrize(("name", "way"), [(A, "llama"), (GQA, "llama f32"), (A, "gguf > llama"), (A, "run > llama")])
def test_transformers_computes_the_exported_llama(tmp_path, name, way):
    numbers = golden_models.expected(name)
    end = through(way, golden_models.folder(name), tmp_path)
    found = transformers_logits(end, numbers["input_ids"], numbers["attention_mask"])
    real = numbers["attention_mask"] == 1
    np.testing.assert_allclose(found[real], numbers["logits"][real], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ROTARY)
def test_transformers_reads_the_rotary_variants(tmp_path, variant):
    source = changed_config(golden_models.folder(A), tmp_path / "source", **ROTARY[variant])
    numbers = golden_models.expected(A, "expected_rope_variants.npz")
    found = transformers_logits(through("llama", source, tmp_path), numbers["input_ids"])
    np.testing.assert_allclose(found[0, -4:], numbers[f"last4_logits_{variant}"], atol=1e-4)


def with_tokenizer(name: str, folder: Path) -> Path:
    """A fixture with the tokenizer that llama.cpp's server asks for."""
    source = folder / name
    shutil.copytree(golden_models.folder(name), source)
    if not (source / "tokenizer.model").exists():
        shutil.copy(golden_models.folder(HISTORY) / "tokenizer.model", source)
    return source


def ours(model, texts=PROMPTS) -> np.ndarray:
    """[texts, vocabulary]: log-probabilities of the token after each."""
    rows = [np.asarray(model(np.array([ids], np.int32)))[0, -1] for ids in texts]
    return np.asarray(jax.nn.log_softmax(np.stack(rows)))


def llama_cpp(file: Path, texts=PROMPTS) -> np.ndarray:
    """The same from llama.cpp."""
    llama = LlamaCpp(file)
    return np.stack([llama.log_probabilities(ids) for ids in texts])


def divergence(right: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL divergence in nats, of each prompt."""
    return np.sum(np.exp(right) * (right - found), axis=-1)


@pytest.mark.parametrize(("name", "way"), [
    (A, "run > gguf"),
    (GQA, "gguf f32"),
    (GQA, "llama f32 > gguf"),
    (GGUF, "gguf f32 > hf > gguf"),
])  # fmt: skip
def test_llama_cpp_computes_the_exported_file(tmp_path, name, way):
    source = with_tokenizer(name, tmp_path)
    right = ours(cpmjax.load(source))
    np.testing.assert_allclose(llama_cpp(through(way, source, tmp_path)), right, atol=1e-4)


def test_llama_cpp_computes_an_f16_file(tmp_path):
    """llama.cpp rounds activations to float16 too: that alone is left, since the same numbers in float32 are exact."""
    source, numbers = golden_models.folder(HISTORY), golden_models.expected(HISTORY)
    convert(source, tmp_path / "f16.gguf", "gguf", steps=[390_000], dtype="f16")
    texts = [row[:length].tolist() for row in numbers["eval_input_ids"][:10] for length in (11, 96)]
    right = ours(cpmjax.load(tmp_path / "f16.gguf"), texts)
    difference = np.abs(llama_cpp(tmp_path / "f16.gguf", texts) - right)
    assert np.quantile(difference, 0.97) < 2e-3 and difference.max() < 6e-3
    end = through("gguf f32", tmp_path / "f16.gguf", tmp_path)
    np.testing.assert_allclose(llama_cpp(end, texts), right, atol=1e-4)


@pytest.mark.parametrize(("quantisation", "from_file", "from_weights"), [("q8_0", 2e-3, 4e-3), ("q4_0", 2e-3, 0.5)])
def test_llama_cpp_computes_a_quantised_file(tmp_path, quantisation, from_file, from_weights):
    """From what we read in the same file it differs by its 8-bit activations alone, whatever the file is.

    From the model it differs by the quantisation too: these weights are random and large, so that 4 bits cost much.
    """
    source = with_tokenizer(GGUF, tmp_path)
    end = through(f"gguf {quantisation}", source, tmp_path)
    found = llama_cpp(end)
    assert divergence(ours(cpmjax.load(end)), found).max() < from_file
    assert divergence(ours(cpmjax.load(source)), found).max() < from_weights


def rewrite(file: Path, target: Path, change=lambda name, array: array, without: str = "") -> Path:
    """A GGUF file with other tensors, or without a key."""
    source = open_gguf(file)
    metadata = {key: value for key, value in source.metadata.items() if key != without}
    infos = {name: (info.shape, GgmlType[info.stored]) for name, info in source.items()}
    write_gguf(target, metadata, infos, (change(name, source.read(name)) for name in source))
    return target


def halves(name: str, array: np.ndarray) -> np.ndarray:
    """The fault of leaving the rows of keys as Hugging Face has them: even ones of a head first, then odd ones."""
    return array.reshape(2, -1, 2, 256).swapaxes(1, 2).reshape(array.shape) if "attn_k" in name else array


@pytest.mark.parametrize(("fault", "least"), [
    ({}, 0.0),
    ({"change": halves}, 0.05),
    ({"without": "minicpm.logit_scale"}, 1.0),
], ids=["none", "keys as Hugging Face has them", "no logit_scale"])  # fmt: skip
def test_planted_faults_show(tmp_path, fault, least):
    """That the bounds above are tight enough to see what goes wrong in such a file."""
    source = with_tokenizer(GGUF, tmp_path)
    file = rewrite(through("gguf f32", source, tmp_path), tmp_path / "fault.gguf", **fault)
    difference = np.abs(llama_cpp(file) - ours(cpmjax.load(source))).max()
    assert difference > least if fault else difference < 1e-4


def test_a_file_without_a_tokenizer_has_no_vocabulary_and_says_so(tmp_path):
    stored = open_stored(golden_models.folder(A))
    said = export_gguf(stored, tmp_path / "a.gguf")
    assert stored.tokenizer is None and any("no tokenizer" in line for line in said)
    assert open_gguf(tmp_path / "a.gguf").metadata["tokenizer.ggml.model"] == "none"
    assert golden_models.difference(cpmjax.load(tmp_path / "a.gguf"), golden_models.expected(A)).max() < 1e-4
