"""Where metrics go."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace

import pytest

from cpmjax.run.config import Config, LogConfig
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.training.log import Log


def record(step, **more):
    metrics = {"step": step, "stage": "stable", "loss": 2.5, "learning_rate": 0.01, "tokens_per_second": 10.0}
    return metrics | more


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_came_after_the_start_is_written_again_not_twice(directory):
    first = Log(directory, Config(), 0, 9)
    for step in (1, 2, 3):
        first.write(record(step))
    first.write_samples([{"step": 3, "prompt": "a", "text": "b"}])
    first.close()
    again = Log(directory, Config(), 2, 9)
    again.write(record(3, loss=1.5))
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(directory.metrics_file)] == [(1, 2.5), (2, 2.5), (3, 1.5)]
    assert lines(directory.samples_file) == []


def test_plain_lines_say_step_stage_loss_and_time_left(directory, capsys):
    log = Log(directory, Config(), 0, 100)
    log.write(record(50, heldout_loss=2.25))
    log.write_samples([{"step": 50, "prompt": "def ", "text": "f(x):\n    return x"}])
    log.close()
    shown = capsys.readouterr().err
    assert "step 50/100 stable" in shown and "held-out 2.2500" in shown and "ETA 0:" in shown
    assert "'def ' goes on 'f(x):\\n    return x'" in shown


def test_tensorboard_gets_the_numbers(directory):
    log = Log(directory, Config(), 0, 9)
    log.write(record(1))
    log.close()
    (events,) = (directory.path / "tensorboard").iterdir()
    assert b"learning_rate" in events.read_bytes()
    other = RunDirectory(directory.path / "without")
    other.path.mkdir()
    Log(other, replace(Config(), log=LogConfig(tensorboard=False)), 0, 9).close()
    assert not (other.path / "tensorboard").exists()


def test_wandb_is_an_option(directory, monkeypatch):
    config = replace(Config(), log=LogConfig(wandb="tunnel"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb = 'tunnel': expected wandb installed"):
        Log(directory, config, 0, 9)

    logged = []
    run = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    asked = {}

    def init(**arguments):
        asked.update(arguments)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = Log(directory, config, 0, 9)
    log.write(record(1))
    log.close()
    assert asked["project"] == "tunnel" and asked["config"]["optimizer"]["learning_rate"] == 0.01
    assert logged == [(1, {"loss": 2.5, "learning_rate": 0.01, "tokens_per_second": 10.0})]
