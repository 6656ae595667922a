"""What is due at each step of a run, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cpmjax.run.config import CheckpointConfig, Config, DataConfig, EvaluationConfig, TrainingConfig
from cpmjax.run.optimizers import AdamW
from cpmjax.run.schedule import WSD, WSDS, Constant
from cpmjax.training.origin import Origin
from cpmjax.training.timeline import Timeline

# Updates 1-4 warm up, 5-14 are stable, 15-20 decay.
CONFIG = Config(
    data=DataConfig(sequence_length=32),
    schedule=WSD(warmup=4, stable=10, decay=6, shape="linear", floor=0.0),
    optimizer=AdamW(learning_rate=0.02, weight_decay=0.1),
    training=TrainingConfig(batch_size=8),
    checkpoint=CheckpointConfig(every=100),
    evaluation=EvaluationConfig(every=7),
)
SCRATCH = Origin({"kind": "trained"})


def timeline(origin: Origin = SCRATCH, schedule=CONFIG.schedule, **checkpoint) -> Timeline:
    return Timeline(replace(CONFIG, schedule=schedule, checkpoint=CheckpointConfig(**checkpoint)), origin)


def due(predicate, total: int = 20) -> list[int]:
    return [step for step in range(1, total + 1) if predicate(step)]


def test_stages_and_total():
    assert timeline().total == 20
    stages = [timeline().stage(step) for step in range(1, 21)]
    assert stages == ["warmup"] * 4 + ["stable"] * 10 + ["decay"] * 6


def test_position_and_tokens_count_rows():
    assert [timeline().position(step) for step in (0, 1, 20)] == [0, 8, 160]
    assert [timeline().tokens(step) for step in (0, 1, 20)] == [0, 256, 5120]


def test_batches_that_grow():
    """4 rows in each of the first 6 steps, then 8: as many rows as 17 steps of 8."""
    grows = replace(CONFIG, training=TrainingConfig(batch_size=8, batch_warmup=((4, 6),)))
    assert [Timeline(grows, SCRATCH).position(step) for step in (0, 1, 6, 7, 20)] == [0, 4, 24, 32, 136]
    batches = list(Timeline(grows, SCRATCH).batches(4))
    assert batches[:4] == [(16, 4), (20, 4), (24, 8), (32, 8)] and len(batches) == 16
    branch = Timeline(grows, Origin({}, step=5, position=1000))
    assert [branch.position(step) for step in (5, 6, 7)] == [1000, 1004, 1012]
    assert branch.batch_sizes() == [4, 8] and Timeline(grows, Origin({}, step=6, position=24)).batch_sizes() == [8]


def test_a_branch_goes_on_from_its_parent_s_place_in_the_data():
    """The parent had consumed 1000 rows at step 12, in batches of another size."""
    branch = timeline(Origin({}, step=12, position=1000))
    assert [branch.position(step) for step in (12, 13, 20)] == [1000, 1008, 1064]
    assert branch.tokens(20) == 1064 * 32


def test_rates_follow_schedule_and_peak():
    for step, factor in {1: 0.25, 4: 1.0, 14: 1.0, 15: 5 / 6, 20: 0.0}.items():
        rates = timeline().rates(step)
        assert timeline().learning_rate(step) == pytest.approx(0.02 * factor)
        assert rates.learning_rate == np.float32(0.02 * factor) and rates.learning_rate.dtype == np.float32
        assert rates.weight_decay == pytest.approx(0.02 * factor * 0.1)


def test_fresh_moments_warm_the_rate_up_again():
    branch = timeline(Origin({}, step=8, position=64, rewarmup=4))
    assert [branch.learning_rate(step) / 0.02 for step in (9, 10, 12, 13)] == pytest.approx([0.25, 0.5, 1.0, 1.0])
    assert branch.rates(9).weight_decay == pytest.approx(0.02 * 0.25 * 0.1)


def test_evaluates_at_intervals_and_at_the_end():
    assert due(timeline().evaluates) == [7, 14, 20]


@pytest.mark.parametrize(
    "rules, steps",
    [
        ({"every": 100}, [14, 20]),  # the last stable step and the last step, whatever the rules say
        ({"every": 6}, [6, 12, 14, 18, 20]),
        ({"every": 6, "every_in_decay": 2}, [6, 12, 14, 16, 18, 20]),
        ({"every": 5, "every_in_decay": 100}, [5, 10, 14, 20]),
        ({"every": 100, "steps": (3, 17)}, [3, 14, 17, 20]),
    ],
)
def test_saves(rules, steps):
    assert due(timeline(**rules).saves) == steps


def test_every_cycle_s_last_stable_step_is_saved():
    cycles = timeline(schedule=WSDS(warmup=2, cycles=((3, 2), (4, 3))), every=100)
    assert due(cycles.saves, cycles.total) == [5, 11, 14]


def test_without_a_decay_the_last_step_alone_is_added():
    assert due(timeline(schedule=Constant(warmup=2, length=18), every=8).saves) == [8, 16, 20]


def test_a_schedule_in_tokens_counts_whole_steps():
    tokens = WSD(unit="tokens", warmup=4 * 256, stable=10 * 256 - 1, decay=6 * 256)
    assert timeline(schedule=tokens).total == 20
    assert timeline(schedule=tokens).stage(14) == "stable"
