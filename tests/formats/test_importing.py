"""A series of checkpoints becomes a run: what the run computes, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
from formats.conversions import (
    GOLDEN,
    HISTORY,
    KEYS,
    SHARED,
    checkpoints,
    command,
    converted,
    copy_history,
    expected,
    flip,
    left_in,
    needs_shared,
    outcome,
    refused,
)

import cpmjax
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.formats.safetensors_files import write_safetensors
from cpmjax.formats.tensors import TensorInfo
from cpmjax.formats.torch_files import open_torch
from cpmjax.model.transformer import MiniCPM

SIX = SHARED / "minicpm-tiny-history"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the two checkpoints."""
    run = tmp_path_factory.mktemp("two") / "run"
    converted(HISTORY, run, "--to=run", *KEYS)
    return run


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("six") / "run"
    converted(SIX, run, "--to=run", *KEYS)
    return run


def losses(model: MiniCPM, ids: np.ndarray) -> np.ndarray:
    """The mean cross entropy of the next tokens, and the logits of the last place of the first two rows, float32."""
    logits = np.asarray(model(jnp.asarray(ids)), np.float64)
    shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    of_next = np.take_along_axis(shifted, ids[:, 1:, None], -1)[..., 0]
    return np.mean(np.log(np.exp(shifted).sum(-1)) - of_next), logits[:2, -1]


# What the run is.


def check_against_the_original(run: Path) -> None:
    numbers = expected()
    known = {int(step): index for index, step in enumerate(numbers["steps"])}
    for step in jobs.steps_of(run):
        loss, last = losses(cpmjax.load(run, step), numbers["eval_input_ids"])
        assert loss == pytest.approx(numbers["eval_loss"][known[step]], abs=1e-4)
        np.testing.assert_allclose(last, numbers["last_position_logits"][known[step]], atol=2e-4)
        with_metadata = checkpoints(run)[step]["metadata"]
        assert with_metadata["learning_rate"] == pytest.approx(numbers["lr"][known[step]], rel=1e-12)
        assert with_metadata | {"learning_rate": 0} == {
            "step": step,
            "tokens": step * 8 * 128,
            "stage": "stable" if step <= 300_000 else "decay",
            "learning_rate": 0,
        }


@pytest.mark.smoke
def test_two_checkpoints_compute_what_the_original_did(two):
    assert jobs.steps_of(two) == [300_000, 390_000]
    check_against_the_original(two)
    assert (two / "tokenizer.model").read_bytes() == (HISTORY / "tokenizer.model").read_bytes()


@needs_shared
def test_all_six(six):
    assert jobs.steps_of(six) == expected()["steps"].tolist()
    check_against_the_original(six)


def test_every_weight_is_that_of_the_file(two):
    """Bit for bit, against the reader of torch files alone."""
    tensors = open_torch(HISTORY / "pytorch_model.390000")
    tree = cpmjax.load(two, 390_000).parameters
    assert np.asarray(tree["embedding"]).tobytes() == tensors.read("model.embed_tokens.weight").tobytes()
    for layer in range(2):
        gate = tensors.read(f"model.layers.{layer}.mlp.gate_proj.weight")
        assert np.asarray(tree["layers"]["gate"][layer]).tobytes() == np.ascontiguousarray(gate.T).tobytes()


def test_parameters_keep_their_type_and_logits_are_float32(two):
    model = cpmjax.load(two)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.parameters)} == {"bfloat16"}
    assert model(jnp.ones((1, 4), jnp.int32)).dtype == jnp.float32


def test_provenance_says_what_came_from_where(two):
    provenance = json.loads((two / "provenance.json").read_text())
    assert (provenance["kind"], provenance["source"]) == ("import", str(HISTORY))
    assert provenance["checkpoints"]["390000"] == {
        "file": "pytorch_model.390000",
        "dtype": "bf16",
        **checkpoints(two)[390_000]["metadata"],
    }


def test_types_on_request(two, tmp_path):
    converted(HISTORY, tmp_path / "run", "--to=run", "--dtype=f32", "--steps=390000", *KEYS)
    wide, narrow = checkpoints(tmp_path / "run")[390_000], checkpoints(two)[390_000]
    assert narrow.pop("metadata") == wide.pop("metadata")
    for path, (dtype, content) in narrow.items():
        assert (dtype, wide[path][0]) == ("bfloat16", "float32")
        assert np.frombuffer(wide[path][1], np.float32).tobytes() == (
            np.frombuffer(content, jnp.bfloat16).astype(np.float32).tobytes()
        )


# How a series may lie.


def save_safetensors(file: Path, step: int, **changed: np.ndarray) -> None:
    tensors = open_torch(HISTORY / f"pytorch_model.{step}")
    arrays = {name: tensors.read(name) for name in tensors} | changed
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in arrays.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(file, infos, arrays.values())


def folders_of_safetensors(folder: Path, own_config: bool) -> None:
    for step in (300_000, 390_000):
        save_safetensors(folder / f"checkpoint-{step}" / "model.safetensors", step)
        if own_config:
            shutil.copy(HISTORY / "config.json", folder / f"checkpoint-{step}")
    if own_config:
        (folder / "config.json").unlink()


@pytest.mark.parametrize("layout", ["bin", "folders of bin", "safetensors", "folders", "folders with config"])
def test_layouts_give_the_same_checkpoints(layout, two, tmp_path):
    source = tmp_path / "source"
    match layout:
        case "bin":
            copy_history(source, step300000="pytorch_model.300000.bin", step390000="pytorch_model.390000.bin")
        case "folders of bin":
            copy_history(source, step300000="step_300000/pytorch_model.bin", step390000="step_390000/pytorch_model.bin")
        case "safetensors":
            for step in (300_000, 390_000):
                save_safetensors(source / f"model.{step}.safetensors", step)
            copy_history(source.with_name("rest"))
            for file in source.with_name("rest").iterdir():
                shutil.copy(file, source)
        case _:
            folders_of_safetensors(copy_history(source), layout.endswith("config"))
    converted(source, tmp_path / "run", "--to=run", *KEYS)
    assert checkpoints(tmp_path / "run") == checkpoints(two)


def test_differences_inside_a_series(two, tmp_path):
    """A head that repeats the embedding, inverse frequencies, and one file in float32 among bf16."""
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000")
    tensors = open_torch(HISTORY / "pytorch_model.390000")
    wide = {name: tensors.read(name).astype(np.float32) for name in tensors}
    frequencies = 10000.0 ** (-np.arange(0, 24, 2) / 24)
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies.astype(np.float32)}
    save_safetensors(
        source / "model.390000.safetensors",
        390_000,
        **wide,
        **extra,
        **{"lm_head.weight": wide["model.embed_tokens.weight"]},
    )
    converted(source, tmp_path / "run", "--to=run", *KEYS)
    run = checkpoints(tmp_path / "run")
    assert run[300_000] == checkpoints(two)[300_000]
    assert run[390_000]["['embedding']"][0] == "float32"
    numbers = expected()
    loss, _ = losses(cpmjax.load(tmp_path / "run", 390_000), numbers["eval_input_ids"])
    assert loss == pytest.approx(numbers["eval_loss"][-1], abs=1e-4)
    lines = json.loads((tmp_path / "run" / "provenance.json").read_text())["checkpoints"]
    assert [line["dtype"] for line in lines.values()] == ["bf16", "f32"]


def test_another_shape_is_refused_and_the_rest_imported(tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000", step390000="pytorch_model.390000")
    save_safetensors(source / "model.1.safetensors", 300_000, **{"model.norm.weight": np.ones(145, np.float32)})
    # A whole and sound model, of one layer.
    small = source / "checkpoint-2"
    config = json.loads((HISTORY / "config.json").read_text()) | {"num_hidden_layers": 1}
    tensors = open_torch(HISTORY / "pytorch_model.300000")
    kept = {name: tensors.read(name) for name in tensors if "layers.1." not in name}
    small.mkdir()
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in kept.items()}
    write_safetensors(small / "model.safetensors", infos, kept.values())
    (small / "config.json").write_text(json.dumps(config))
    # The lowest step makes the run, so that of the larger model comes first.
    shutil.move(source / "pytorch_model.300000", source / "pytorch_model.0")
    code, stderr = command(source, tmp_path / "run", "--to=run", *KEYS)
    assert code == 1 and "Traceback" not in stderr
    assert "model.1.safetensors: model.norm.weight is 145; expected 144" in stderr
    assert "checkpoint-2/model.safetensors: another model than the run's: layers 1, not 2; expected one" in stderr
    assert stderr.splitlines()[-1] == (
        "not converted, for the reasons above: model.1.safetensors, checkpoint-2/model.safetensors"
    )
    assert jobs.steps_of(tmp_path / "run") == [0, 390_000]


def test_two_files_of_one_step(tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000", step390000="pytorch_model.300000.bin")
    message = refused(source, tmp_path / "run", "--to=run", *KEYS)
    assert "pytorch_model.300000 and pytorch_model.300000.bin are both of step 300000" in message
    assert left_in(tmp_path) == ["source"]


def test_a_single_model_gets_the_step_it_is_given(tmp_path):
    converted(GOLDEN / "minicpm-tiny-gqa", tmp_path / "dated", "--to=run", "--step=300000", *KEYS)
    assert checkpoints(tmp_path / "dated")[300_000]["metadata"]["stage"] == "stable"
    converted(GOLDEN / "minicpm-tiny-gqa", tmp_path / "undated", "--to=run")
    [(step, found)] = checkpoints(tmp_path / "undated").items()
    assert (step, found["metadata"]) == (0, {"step": 0, "tokens": None, "stage": "imported", "learning_rate": None})


# What is wrong with a file of a series stops no other.


def test_a_whole_series_of_garbage_leaves_nothing_behind(tmp_path):
    source = copy_history(tmp_path / "source")
    for step in range(3):
        (source / f"pytorch_model.{step}").write_bytes(b"garbage" * step)
    code, stderr = command(source, tmp_path / "run", "--to=run", *KEYS)
    assert code == 1
    for step in range(3):
        assert f"step {step}: NOT imported: {source}/pytorch_model.{step}: " in stderr
    assert left_in(tmp_path) == ["source"]


def test_a_broken_config_or_tokenizer_leaves_nothing_behind(tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000")
    (source / "tokenizer.model").write_bytes(b"no pieces")
    assert "tokenizer.model" in refused(source, tmp_path / "run", "--to=run", *KEYS)
    (source / "config.json").write_text("{}")
    assert f"{source}/config.json: model_type" in refused(source, tmp_path / "run", "--to=run", *KEYS)
    assert left_in(tmp_path) == ["source"]


def test_a_value_that_the_type_cannot_hold(tmp_path):
    """It shows while the checkpoint is being written."""
    source = copy_history(tmp_path / "source", step390000="pytorch_model.390000")
    save_safetensors(source / "model.5.safetensors", 300_000, **{"model.norm.weight": np.full(144, 1e30, np.float32)})
    code, stderr = command(source, tmp_path / "run", "--to=run", "--dtype=f16", *KEYS)
    assert code == 1 and "step 5: NOT imported: final_norm: holds 1e+30, too large for f16" in stderr
    assert left_in(tmp_path / "run" / "checkpoints") == ["390000"]
    message = refused(source, tmp_path / "other", "--to=run", "--dtype=f16", "--step=5", *KEYS)
    assert message == "final_norm: holds 1e+30, too large for f16; expected --dtype bf16 or f32"
    assert left_in(tmp_path) == ["run", "source"]


@pytest.mark.parametrize("largest", [True, False])
def test_a_bit_that_flips_on_the_disk_is_found(largest, two, tmp_path, monkeypatch):
    weights = Checkpoints.weights

    def after_a_flip(self, step, config):
        if step == 300_000:
            flip(Path(self.directory) / str(step), largest)
        return weights(self, step, config)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "weights", after_a_flip)
        code, stderr = command(HISTORY, tmp_path / "run", "--to=run", *KEYS)
    assert code == 1
    assert ("reads back otherwise than it was written" if largest else "cannot be restored") in stderr
    assert jobs.steps_of(tmp_path / "run") == [390_000]
    converted(HISTORY, tmp_path / "run", "--to=run", *KEYS)
    assert outcome(tmp_path / "run")["checkpoints"] == checkpoints(two)
