"""What others build on: names, signatures, keys, files of a run and keys of its metrics. Changing one breaks them."""

from __future__ import annotations

import inspect
import json
from typing import get_args

import jax
import jobs
import numpy as np
import pytest

import cpmjax
from cpmjax.run import cli
from cpmjax.run.config import Attention, Config
from cpmjax.run.directory import RunDirectory
from cpmjax.run.identity import encode, flatten
from cpmjax.train import main

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a short run with everything on."""
    folder = tmp_path_factory.mktemp("surface")
    experiment = jobs.experiment(
        folder,
        "run",
        schedule={"type": "wsd", "warmup": 1, "stable": 3, "decay": 2},
        checkpoint={"every": 2},
        evaluation={"every": 3},
        log={"tensorboard": True},
    )
    cache = jax.config.jax_compilation_cache_dir
    try:
        assert main([str(experiment)]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    return RunDirectory(folder / "run")


def test_names():
    assert set(cpmjax.__all__) == {"Sampler", "Series", "UserError", "load", "load_tokenizer"}
    assert all(hasattr(cpmjax, name) and name in dir(cpmjax) for name in cpmjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        cpmjax.lode  # noqa: B018


def signature(function) -> dict[str, object]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_signatures():
    assert signature(cpmjax.load) == {"path": inspect.Parameter.empty, "step": None, "compute": None, "average": False}
    assert signature(cpmjax.load_tokenizer) == {"path": inspect.Parameter.empty}
    empty = inspect.Parameter.empty
    made = {"model": empty, "tokenizer": None, "cache_dtype": "compute", "max_batch": None}
    assert signature(cpmjax.Sampler) == made
    called = {"max_new_tokens": 64, "n": 1, "stop": (), "stop_ids": None, "logprobs": 0, "prompt_logprobs": False}
    assert signature(cpmjax.Sampler.__call__) == {"self": empty, "prompts": empty, **called, "options": empty}


def test_keys_that_do_not_change(tmp_path):
    keys = flatten(encode(Config()))
    assert {"run.directory", "run.seed", "branch.run", "branch.step"} <= keys.keys()
    argv = [
        f"--run.directory={tmp_path}",
        "--run.seed=3",
        "--data.corpora.a.type=standard_library",
        "--data.stable.a=1",
    ]
    config = cli.load(argv, {}, "")
    assert (config.run.directory, config.run.seed) == (str(tmp_path), 3)


def test_names_of_attention():
    assert get_args(Attention) == ("auto", "plain", "chunked", "cudnn", "triton", "splash")
    assert Config().compute.attention == "auto"


def test_files_of_a_run(run):
    files = {"config.yaml", "tokenizer.model", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "provenance.json"}
    assert files | {"checkpoints", "plots"} <= {path.name for path in run.path.iterdir()}
    assert run.config_file.read_text().startswith("# fingerprint: ")
    assert json.loads(run.provenance_file.read_text())["kind"] == "trained"
    assert {path.suffix for path in run.plots.iterdir()} == {".png"}
    for step in jobs.steps_of(run.path):
        items = {path.name for path in (run.checkpoints / str(step)).iterdir()}
        assert {"parameters", "optimizer", "position"} <= items
    assert jobs.steps_of(run.path) == [2, 4, 6]


def test_metadata_of_a_checkpoint(run):
    store = jobs.Checkpoints(run.checkpoints)
    assert store.metadata(6).keys() == {"step", "tokens", "stage", "learning_rate"}
    assert store.position(6)["sequences"] == 6 * 4
    store.close()


def test_keys_of_the_metrics(run):
    records = jobs.records(run.path, clock=True)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    promised = {"step", "tokens", "loss", "learning_rate", "grad_norm", "stage", "tokens_per_second", "mfu", "seconds"}
    for record in records:
        assert promised <= record.keys()
    evaluated = [record["step"] for record in records if {"heldout_loss", "heldout_bits_per_byte"} <= record.keys()]
    assert evaluated == [3, 6]
    samples = [json.loads(line) for line in run.samples_file.read_text().splitlines()]
    assert all(sample.keys() == {"step", "prompt", "text"} for sample in samples)
    assert [sample["step"] for sample in samples] == [3, 6]


def test_a_run_loads_into_logits_and_text(run):
    model, tokenizer = cpmjax.load(run.path), cpmjax.load_tokenizer(str(run.path))
    text = "some words"
    tokens = np.array([tokenizer.encode(text)], np.int32)
    assert tokenizer.decode(tokens[0]) == text
    logits = model(tokens)
    assert logits.shape == (1, tokens.shape[1], 320) and logits.dtype == np.float32
    earlier = cpmjax.load(run.path, step=2)(tokens)
    np.testing.assert_array_equal(cpmjax.load(run.path, step=6)(tokens), logits)
    assert not np.array_equal(earlier, logits)
