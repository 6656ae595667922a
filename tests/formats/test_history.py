"""When the checkpoints of a series were made: the published schedule, keys that override it, and names of files."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats.conversions import KEYS, expected

from cpmjax.formats.history import PUBLISHED, Chronology, find_steps, is_published, published_keys
from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

MINICPM_2B = ModelConfig(**PRESETS["minicpm-2b"])
OTHER = ModelConfig(**PRESETS["tunnel-9m"])


def facts(step: int, *keys: str, model: ModelConfig = MINICPM_2B) -> dict:
    chronology = Chronology("history", keys, dated=True)
    return chronology.facts(chronology.configure(Path("run"), model), step)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "stable, half_life, shares",
    [
        # The table of the sources: decay from 261000 (model card) or 263000 (blog), half-life 5000 (paper) or 8000.
        (261_000, 5_000, {270_000: 0.29, 279_500: 0.077, 280_000: 0.072}),
        (261_000, 8_000, {270_000: 0.46, 279_500: 0.20, 280_000: 0.19}),
        (263_000, 5_000, {270_000: 0.38, 279_500: 0.10, 280_000: 0.095}),
        (263_000, 8_000, {270_000: 0.55, 279_500: 0.24, 280_000: 0.23}),
    ],
)
def test_rates_of_the_2b_run(stable, half_life, shares):
    keys = [f"--schedule.stable={stable - 2795}", f"--schedule.half_life={half_life}"]
    if (stable, half_life) == (261_000, 5_000):
        keys = []  # what is taken by default
    for step, share in shares.items():
        # As many digits as the table has.
        assert facts(step, *keys)["learning_rate"] == pytest.approx(0.01 * share, rel=0.03)
        assert facts(step, *keys)["stage"] == "decay"


@pytest.mark.smoke
def test_stages_and_tokens_of_the_2b_run():
    assert facts(260_000) == {
        "step": 260_000,
        "tokens": 260_000 * 960 * 4096,
        "stage": "stable",
        "learning_rate": 0.01,
    }
    assert facts(261_000)["stage"] == "stable"
    assert facts(261_001)["stage"] == "decay"
    assert facts(270_000)["tokens"] == 270_000 * 960 * 4096
    assert facts(2_000)["stage"] == "warmup"
    # The published rest of the decay, after the last step that was used.
    assert facts(300_000)["stage"] == "decay"
    # Some 1.1e12 tokens are said of the whole.
    assert facts(279_500)["tokens"] == pytest.approx(1.1e12, rel=0.01)


def test_the_shape_alone_tells_the_published_run():
    assert is_published(MINICPM_2B)
    assert is_published(ModelConfig(**PRESETS["minicpm-2b"] | {"context": 2048}))
    assert not is_published(ModelConfig(**PRESETS["minicpm-1b"]))
    assert not is_published(OTHER)
    assert facts(7, model=OTHER) == {"step": 7, "tokens": None, "stage": "imported", "learning_rate": None}


def test_one_key_overrides_one_published_fact():
    assert facts(260_000, "--training.batch_size=480")["tokens"] == 260_000 * 480 * 4096
    assert facts(270_000, "--schedule.half_life=8000")["learning_rate"] == pytest.approx(0.0046, abs=5e-5)
    assert facts(270_000, "--optimizer.learning_rate=0.02")["learning_rate"] == 2 * facts(270_000)["learning_rate"]


def test_what_is_published_is_said_with_what_contradicts_it():
    published = Chronology("history", (), dated=True).describe(MINICPM_2B)
    table = "\n".join(published)
    for fact in PUBLISHED:
        assert fact.source in table and f"--{fact.key}" in table and fact.others in table
    assert "263000" in table and "8000" in table  # the blog's numbers
    assert {"schedule", "optimizer", "training", "data"} == published_keys().keys()
    [unknown] = Chronology("history", (), dated=True).describe(OTHER)
    assert "not known" in unknown and "--schedule" in unknown and "--training.batch_size" in unknown
    assert Chronology("history", KEYS, dated=True).describe(OTHER) == []
    assert Chronology("model", (), dated=False).describe(OTHER) == []


def test_the_small_history_by_keys():
    numbers = expected()
    for step, rate in zip(numbers["steps"], numbers["lr"], strict=True):
        found = facts(int(step), *KEYS, model=OTHER)
        assert found["learning_rate"] == pytest.approx(rate, rel=1e-12)
        assert found["stage"] == ("stable" if step <= 300_000 else "decay")
        assert found["tokens"] == step * 8 * 128


def test_keys_that_say_too_little_or_nothing_that_there_is():
    with pytest.raises(UserError) as caught:
        facts(1, "--schedule.warmup=10", "--training.batch_size=4", model=OTHER)
    message = str(caught.value)
    assert message.startswith("history: --schedule.warmup=10 alone says too little; expected ")
    assert "--optimizer.learning_rate, --data.sequence_length" in message and "batch_size" not in message
    with pytest.raises(UserError, match=r"command line: schedul: no such key; .*\(nearest: schedule\)"):
        facts(1, "--schedul.warmup=10", model=OTHER)
    with pytest.raises(UserError, match=r"schedule.half_lif: no such key; .*\(nearest: half_life\)"):
        facts(1, "--schedule.half_lif=10")
    with pytest.raises(UserError, match=r"training.batch_size = 0: expected"):
        facts(1, "--training.batch_size=0")


@pytest.mark.parametrize(
    "names, steps",
    [
        (
            ["pytorch_model.270000", "pytorch_model.60000"],
            {60_000: "pytorch_model.60000", 270_000: "pytorch_model.270000"},
        ),
        (["pytorch_model.7.bin", "config.json", "tokenizer.model"], {7: "pytorch_model.7.bin"}),
        (["model.7.safetensors", "step-8.safetensors"], {7: "model.7.safetensors", 8: "step-8.safetensors"}),
        (["checkpoint-10/model.safetensors", "step_20/pytorch_model.bin"], {10: "checkpoint-10", 20: "step_20"}),
        (["30/model.safetensors.index.json", "30/model-00001-of-00001.safetensors"], {30: "30"}),
        # No checkpoints: one model, its shards, a number that is no step, folders without weights, and those deeper.
        (["pytorch_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.7.old"], {}),
        (["checkpoint-10/config.json", "logs/40/pytorch_model.bin", "10.d/notes.txt", "v2.json"], {}),
    ],
)
def test_steps_by_name(names, steps):
    assert find_steps(names) == steps
    assert list(find_steps(reversed(names))) == sorted(steps)


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.7", "pytorch_model.7.bin"],
        ["pytorch_model.7", "pytorch_model.007"],
        ["checkpoint-7/model.safetensors", "pytorch_model.7"],
        ["checkpoint-7/model.safetensors", "step-7/model.safetensors"],
    ],
)
def test_two_of_one_step(names):
    with pytest.raises(UserError, match="are both of step 7; expected one file or folder a step") as caught:
        find_steps(names)
    assert all(name.partition("/")[0] in str(caught.value) for name in names)


def test_a_model_with_checkpoints_of_its_making_below_is_one_model():
    below = [f"checkpoint-{step}/model.safetensors" for step in (500, 1000)]
    assert find_steps([*below, "config.json", "model.safetensors"]) == {}
    assert list(find_steps([*below, "config.json"])) == [500, 1000]
