"""Held-out loss against logits and sums in float64; samples as a pure function of parameters, seed and step."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cpmjax.data import tokenizer as tokenizers
from cpmjax.data.batches import Rows
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.data.tokens import Split
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.sharding import partition
from cpmjax.run.config import Config, DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from cpmjax.run.sources import TextFolder
from cpmjax.sampling.prompts import Prompts
from cpmjax.training.evaluation import HeldOut

VOCABULARY, LENGTH = 300, 16
CONFIG = Config(
    run=RunConfig(seed=5),
    model=ModelConfig(vocabulary=VOCABULARY, width=16, layers=1, heads=2, feed_forward=32, dim_model_base=8),
    data=DataConfig(
        corpora={name: TextFolder(path=name) for name in ("words", "others")},
        stable={"words": 3.0, "others": 1.0},
        sequence_length=LENGTH,
    ),
    training=TrainingConfig(batch_size=8, accumulation=2),
    evaluation=EvaluationConfig(rows=9, prompts=("a b", "hello there"), sample_tokens=6, temperature=1.0),
)
BY_ROW = NamedSharding(make_mesh(CONFIG.mesh, jax.devices()[:1]), partition(("rows", "length")))


def texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(9)) for _ in range(count)]


@pytest.fixture(scope="module")
def world():
    """Documents of two corpora, their rows, a tokenizer trained on them, parameters, and what HeldOut says."""
    # "é" is two bytes and "日" is no piece: it is spelled in three bytes.
    documents = {"words": [*texts(0, 12), "é " * 9], "others": [*texts(1, 3), "日 a " * 4]}
    tokenizer = Tokenizer(tokenizers.train([*documents["words"], *texts(2, 60)], VOCABULARY, 10**6))
    rows = {}
    for name, contents in documents.items():
        ids = tokenizer.encode_documents(contents)
        offsets = np.cumsum([0, *map(len, ids)]).astype(np.int64)
        rows[name] = Rows(Split(f"{name} (held_out)", np.concatenate(ids), offsets), LENGTH, None)
    parameters = jax.jit(initialise, static_argnums=0)(CONFIG.model, jax.random.key(0))
    record = HeldOut(CONFIG, rows, tokenizer, BY_ROW)(parameters)
    return SimpleNamespace(rows=rows, tokenizer=tokenizer, parameters=parameters, record=record)


def by_hand(world, name: str) -> tuple[float, float]:
    """(nats per token, bits per byte) of the first rows of a corpus, one row at a time, from logits in float64."""
    nats, tokens, size = 0.0, 0, 0
    model = MiniCPM(CONFIG.model, world.parameters)
    for index in range(min(CONFIG.evaluation.rows, world.rows[name].rows)):
        row = world.rows[name].row(index)
        logits = model(row["tokens"][None], row["positions"][None], row["segments"][None])
        logits = np.asarray(logits, np.float64)[0]
        for place in np.flatnonzero(row["weights"]):
            target = int(row["targets"][place])
            nats += np.log(np.exp(logits[place]).sum()) - logits[place, target]
            tokens += 1
            text = world.tokenizer.decode([target])
            size += 1 if text == "\ufffd" else len(text.encode())  # a byte alone is no text
    return nats / tokens, nats / np.log(2) / size


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["words", "others"])
def test_nats_and_bits_are_those_of_the_logits(world, name):
    nats, bits = by_hand(world, name)
    assert world.record[f"heldout/{name}"] == pytest.approx(nats, abs=1e-5)
    assert world.record[f"bits_per_byte/{name}"] == pytest.approx(bits, rel=1e-5)


def test_the_rows_reach_the_limit_and_the_padding(world):
    """What the test above rests on: one corpus is cut at the limit, the other fills up its last batch and row."""
    assert world.rows["words"].rows > CONFIG.evaluation.rows
    others = world.rows["others"]
    assert others.rows < CONFIG.evaluation.rows and others.rows % 4
    assert (others.row(others.rows - 1)["segments"] == 0).any()


def test_the_means_are_weighted_as_the_stable_mixture(world):
    for mean, each in (("heldout_loss", "heldout"), ("heldout_bits_per_byte", "bits_per_byte")):
        expected = 0.75 * world.record[f"{each}/words"] + 0.25 * world.record[f"{each}/others"]
        assert world.record[mean] == pytest.approx(expected, rel=1e-12)


def test_batch_size_does_not_matter(world):
    """4 rows a batch pad the last one; 3 do so elsewhere."""
    config = replace(CONFIG, training=TrainingConfig(batch_size=3))
    other = HeldOut(config, world.rows, world.tokenizer, BY_ROW)(world.parameters)
    assert other == {name: pytest.approx(value, abs=1e-5) for name, value in world.record.items()}


def test_samples_depend_on_parameters_seed_and_step_alone(world):
    def sample(step: int, seed: int = CONFIG.run.seed, scale: float = 1.0):
        config = replace(CONFIG, run=RunConfig(seed=seed))
        parameters = jax.tree.map(lambda x: scale * x, world.parameters)
        return Prompts(config, world.tokenizer, BY_ROW)(parameters, step)

    first = sample(10)
    assert [record["prompt"] for record in first] == ["a b", "hello there"]
    assert all(record["step"] == 10 and record["text"] for record in first)
    assert sample(10) == first
    text = [record["text"] for record in first]
    for other in (sample(20), sample(10, seed=6), sample(10, scale=2.0)):
        assert [record["text"] for record in other] != text


def test_no_prompts_no_samples(world):
    config = replace(CONFIG, evaluation=EvaluationConfig(prompts=()))
    assert Prompts(config, world.tokenizer, BY_ROW)(world.parameters, 1) == []
