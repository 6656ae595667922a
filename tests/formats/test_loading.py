"""cpmjax.load and load_tokenizer: the same model and the same ids from whatever they lie in."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats.conversions import HISTORY, KEYS, converted, copy_history, expected
from golden_models import GOLDEN
from golden_models import expected as golden

import cpmjax
from cpmjax.run.config import ComputeConfig
from cpmjax.run.errors import UserError

TEXT = "A tokenizer knows <用户>, <AI> and 1234."
EXACT = ComputeConfig(dtype="float32")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last checkpoint of the history in every kind of place."""
    folder = tmp_path_factory.mktemp("places")
    converted(HISTORY, folder / "run", "--to=run", *KEYS)
    converted(folder / "run", folder / "folder", "--to=hf")
    converted(folder / "run", folder / "model.gguf", "--to=gguf")
    shutil.copytree(folder / "folder", folder / "of_torch")
    (folder / "of_torch" / "model.safetensors").unlink()
    shutil.copy(HISTORY / "pytorch_model.390000", folder / "of_torch" / "pytorch_model.bin")
    return {
        "run": folder / "run",
        "folder": folder / "folder",
        "folder of torch": folder / "of_torch",
        "GGUF": folder / "model.gguf",
        "safetensors beside its config": folder / "folder" / "model.safetensors",
        "torch beside its config": folder / "of_torch" / "pytorch_model.bin",
        "checkpoint of a history": HISTORY / "pytorch_model.390000",
    }


KINDS = [
    "run",
    "folder",
    "folder of torch",
    "GGUF",
    "safetensors beside its config",
    "torch beside its config",
    "checkpoint of a history",
]


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_from_everywhere(kind, places):
    numbers = expected()
    model = cpmjax.load(places[kind], compute=EXACT)
    logits = model(jnp.asarray(numbers["eval_input_ids"][:2]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, -1], numbers["last_position_logits"][-1], atol=2e-4)


@pytest.mark.parametrize("kind", ["run", "folder", "checkpoint of a history"])
def test_parameters_keep_their_type(kind, places):
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(cpmjax.load(places[kind]).parameters)}
    assert types == {"bfloat16"}


def test_a_run_of_an_accelerator_loads_anywhere(places, tmp_path):
    run = shutil.copytree(places["run"], tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert text.count("attention: auto") == 1
    (run / "config.yaml").write_text(text.replace("attention: auto", "attention: splash"))
    tokens = jnp.asarray(expected()["eval_input_ids"][:2])
    np.testing.assert_array_equal(cpmjax.load(run)(tokens), cpmjax.load(places["run"])(tokens))


def test_a_step_of_a_run_or_of_a_history(places):
    numbers = expected()
    for path in (places["run"], str(HISTORY)):
        logits = cpmjax.load(path, 300_000)(jnp.asarray(numbers["eval_input_ids"][:2]))
        np.testing.assert_allclose(logits[:, -1], numbers["last_position_logits"][3], atol=2e-4)


@pytest.mark.parametrize("name", ["minicpm-tiny-a", "minicpm-tiny-gqa"])
def test_golden_models_load_as_they_are(name):
    numbers = golden(name)
    real = numbers["attention_mask"][0] == 1
    logits = cpmjax.load(GOLDEN / name)(jnp.asarray(numbers["input_ids"][:1], jnp.int32))
    np.testing.assert_allclose(np.asarray(logits)[0, real], numbers["logits"][0, real], atol=2e-4)


@pytest.mark.parametrize("kind", ["run", "folder", "GGUF"])
def test_the_same_ids_from_everywhere(kind, places):
    tokenizer, original = cpmjax.load_tokenizer(places[kind]), cpmjax.load_tokenizer(HISTORY)
    assert tokenizer.text_start == original.text_start == "prefix_space"
    assert tokenizer.encode(TEXT) == original.encode(TEXT)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == original.decode(original.encode(TEXT))
    # A bare sentencepiece model starts as sentencepiece does.
    assert cpmjax.load_tokenizer(HISTORY / "tokenizer.model").text_start == "plain"


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_paths_that_are_nothing(places, tmp_path):
    nothing = tmp_path / "nothing"
    assert refusal(lambda: cpmjax.load(nothing)) == f"{nothing}: No such file or directory; expected weights"
    assert str(nothing) in refusal(lambda: cpmjax.load_tokenizer(nothing))
    (tmp_path / "empty").mkdir()
    assert refusal(lambda: cpmjax.load(tmp_path / "empty")) == (
        f"{tmp_path}/empty: no config.yaml, config.json or pytorch_model.<step> in it; "
        "expected a run directory, a Hugging Face folder or a folder of checkpoints"
    )
    assert f"{tmp_path}/empty/tokenizer.model: No such file" in (
        refusal(lambda: cpmjax.load_tokenizer(tmp_path / "empty"))
    )
    text = tmp_path / "notes.txt"
    text.write_text("a year of work")
    assert "begins with b'a year o'; expected weights" in refusal(lambda: cpmjax.load(text))
    assert str(text) in refusal(lambda: cpmjax.load_tokenizer(text))


def test_what_is_there_only_in_part(places, tmp_path):
    copy_history(tmp_path / "no_weights")
    assert f"{tmp_path}/no_weights: holds no weights" in refusal(lambda: cpmjax.load(tmp_path / "no_weights"))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(HISTORY / "pytorch_model.390000", alone / "pytorch_model.bin")
    assert f"{alone}/config.json: No such file" in refusal(lambda: cpmjax.load(alone / "pytorch_model.bin"))
    bare = tmp_path / "bare"
    shutil.copytree(places["run"], bare)
    shutil.rmtree(bare / "checkpoints" / "390000")
    assert f"{bare} has no checkpoint of step 390000: expected one of 300000" in (
        refusal(lambda: cpmjax.load(bare, 390_000))
    )
    shutil.rmtree(bare / "checkpoints" / "300000")
    assert f"{bare} has no checkpoint yet" in refusal(lambda: cpmjax.load(bare))
    shutil.rmtree(bare / "checkpoints")
    assert f"{bare} has no checkpoints" in refusal(lambda: cpmjax.load(bare))


def test_steps_that_are_missing_or_too_many(places):
    assert refusal(lambda: cpmjax.load(HISTORY)) == (
        f"{HISTORY}: a series of checkpoints; expected a step, one of 300000, 390000"
    )
    assert "expected a step, one of 300000, 390000" in refusal(lambda: cpmjax.load(HISTORY, 7))
    assert "holds one model, without steps; expected no step, got 7" in (
        refusal(lambda: cpmjax.load(places["folder"], 7))
    )
    assert "expected no step, got 7" in refusal(lambda: cpmjax.load(places["GGUF"], 7))


def test_a_gguf_file_without_a_vocabulary(tmp_path):
    converted(GOLDEN / "minicpm-tiny-gqa", tmp_path / "model.gguf", "--to=gguf")
    message = refusal(lambda: cpmjax.load_tokenizer(tmp_path / "model.gguf"))
    assert message.startswith(f"{tmp_path}/model.gguf: has no vocabulary")
