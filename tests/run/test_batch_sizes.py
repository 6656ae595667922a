"""The sizes of batches against a list that is written out step by step."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.config import Config, DataConfig, TrainingConfig, validate
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD, WSDS, CosineLoop

positive = st.integers(1, 9)
stages = st.lists(st.tuples(positive, positive), max_size=3).map(tuple)


@given(stages, positive, positive, st.integers(0, 40), st.integers(0, 40))
def test_every_question_is_answered_as_the_list_does(warmup, final, row_tokens, after, last) -> None:
    sizes = [rows for rows, steps in warmup for _ in range(steps)] + [final] * 60
    batches = BatchSizes(final, row_tokens, warmup)
    consumed = [0, *itertools.accumulate(sizes)]
    assert [batches.size(step) for step in range(1, 41)] == sizes[:40]
    assert [batches.rows(step) for step in range(41)] == consumed[:41]
    assert batches.used(after, last) == list(dict.fromkeys(sizes[after:last]))
    for tokens in range(0, consumed[40] * row_tokens, 7):
        assert batches.steps(tokens) == next(n for n, rows in enumerate(consumed) if rows * row_tokens >= tokens)


@given(stages, positive, positive)
def test_a_warmup_in_tokens_is_the_one_in_steps(warmup, final, row_tokens) -> None:
    in_tokens = [(rows, rows * steps * row_tokens) for rows, steps in warmup]
    assert BatchSizes.counted(final, row_tokens, in_tokens, "tokens").warmup == warmup
    assert BatchSizes.counted(final, row_tokens, warmup, "steps").warmup == warmup


def test_an_end_inside_a_step_is_rounded_up() -> None:
    """100 tokens in steps of 16 end in step 7, after 112; the next stage ends at 200, in its third step of 32."""
    assert BatchSizes.counted(8, 8, [(2, 100), (4, 100)], "tokens").warmup == ((2, 7), (4, 3))


def config(schedule=WSD(warmup=4, stable=10, decay=6), **training) -> Config:
    return Config(data=DataConfig(sequence_length=32), schedule=schedule, training=TrainingConfig(**training))


def test_a_schedule_in_tokens_counts_the_tokens_of_each_step() -> None:
    """10 steps of 128 tokens and 5 of 256 are 2560; the decay takes 1280 more, in batches of 256."""
    tokens = WSD(unit="tokens", warmup=640, stable=2560 - 640, decay=1280, shape="half_life", half_life=512.0)
    asked = config(tokens, batch_size=8, batch_warmup=((4, 1280),))
    schedule = asked.schedule.in_steps(asked.batches)
    assert (schedule.warmup, schedule.stable, schedule.decay, schedule.half_life) == (5, 10, 5, 2.0)
    # The same decay right after step 8, where a step is half as large, takes more of them: 2 of 128 and 4 of 256.
    early = asked.branched(WSD(unit="tokens", warmup=640, stable=0, decay=1280), 8)
    assert (early.schedule.warmup, early.schedule.stable, early.schedule.decay) == (5, 3, 6)
    assert early.training.batch_warmup == ((4, 10),) and early.schedule.unit == "steps"
    with pytest.raises(UserError, match=r"schedule.half_life in tokens: .* steps 9 to 14, not 4 and 8 rows"):
        asked.branched(tokens, 8)


@pytest.mark.parametrize(
    "schedule, key",
    [
        (WSDS(unit="tokens", warmup=0, cycles=((512, 512), (512, 512)), shape="half_life", half_life=9.0), "half_life"),
        (CosineLoop(unit="tokens", warmup=0, length=2048, half_period=512), "half_period"),
    ],
)
def test_a_repeated_length_in_tokens_needs_one_size(schedule, key) -> None:
    with pytest.raises(UserError, match=rf"schedule.{key} in tokens: expected batches of one size"):
        validate(config(schedule, batch_size=4, batch_warmup=((2, 1024),)))


@pytest.mark.parametrize(
    "training, message",
    [
        ({"batch_warmup": ((0, 3),)}, "expected [rows a step, length] of each stage, both positive whole numbers"),
        ({"batch_warmup": ((4, -3),)}, "expected [rows a step, length] of each stage, both positive whole numbers"),
        ({"batch_warmup": ((4, 8), (8, 12))}, "expected an end before step 20, the last, got step 20"),
        (
            {"batch_size": 16, "accumulation": 4, "batch_warmup": ((7, 3),)},
            "expected not 7 but a multiple of 2, its micro-batches of at most 4 rows",
        ),
    ],
)
def test_refused_in_one_line(training, message) -> None:
    with pytest.raises(UserError) as error:
        validate(config(**training))
    assert str(error.value) == f"training.batch_warmup = {training['batch_warmup']!r}: {message}"


def test_a_smaller_batch_takes_as_few_micro_batches_as_hold_it() -> None:
    training = config(batch_size=16, accumulation=4, batch_warmup=((4, 1), (8, 1), (6, 1))).training
    assert [training.micro_batches(rows) for rows in (4, 6, 8, 16)] == [1, 2, 2, 4]
