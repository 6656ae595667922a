"""Where the seconds of a job go."""

from __future__ import annotations

import types

import pytest

from cpmjax.run.config import Config
from cpmjax.training import metrics
from cpmjax.training.metrics import Throughput


def test_every_second_of_a_job_is_of_one_kind(monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(perf_counter=lambda: now))
    throughput = Throughput(Config(), began=100.0)
    now = 110.0
    waited = 0.0
    throughput.start(lambda: waited)

    now, waited = 118.0, 3.0
    line = throughput.measure(800)
    assert line.pop("mfu") > 0
    assert line == {"tokens_per_second": 100, "goodput": pytest.approx(5 / 18), "seconds": 8}

    for kind, seconds in (("evaluation", 4.0), ("saving", 2.0), ("profiling", 1.0), ("evaluation", 0.5)):
        with throughput.paused(kind):
            now += seconds
    now += 4.5
    line = throughput.measure(900)
    assert line["tokens_per_second"] == 200 and line["goodput"] == pytest.approx(9.5 / 30)
    now += 10.0
    assert throughput.measure(100)["tokens_per_second"] == 10  # a pause counts in one line

    steps, job = throughput.summary(3, 1800).splitlines()
    assert steps.startswith("3 steps in 30.0 s, 80 tokens/s and MFU ") and steps.endswith(
        "; 3.0 s of it waiting for data"
    )
    assert job == (
        "goodput 48.8% of 40.0 s: steps 19.5 s, start-up 10.0 s, waiting for data 3.0 s, evaluation 4.5 s, "
        "saving 2.0 s, profiling 1.0 s"
    )
