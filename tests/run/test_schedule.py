"""Schedules against their formulas in float64, published values, optax, and the properties all of them share."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD, WSDS, Constant, Cosine, CosineLoop, Schedule, Stage, rewarmup

SHAPES = ("half_life", "exponential", "linear", "cosine", "one_minus_sqrt", "one_minus_square", "inverse")

length = st.integers(0, 100)
floor = st.floats(0.01, 1.0)
decay_shapes = st.fixed_dictionaries({"shape": st.sampled_from(SHAPES[1:]), "floor": floor}) | st.fixed_dictionaries(
    {"shape": st.just("half_life"), "half_life": st.floats(0.5, 1000)}
)
schedules = st.one_of(
    st.builds(lambda lengths, shape: WSD(*lengths, **shape), st.tuples(length, length, length), decay_shapes),
    st.builds(
        lambda warmup, cycles, shape: WSDS(warmup, tuple(cycles), **shape),
        length,
        st.lists(st.tuples(length, length), min_size=1, max_size=4),
        decay_shapes,
    ),
    st.builds(Cosine, length, length, floor),
    st.builds(CosineLoop, length, length, floor, st.integers(1, 300)),
    st.builds(Constant, length, length),
).filter(lambda schedule: not list(schedule.problems()))


def decay_to(shape: str, floor: float) -> WSD:
    return WSD(10, 20, 1000, shape, floor)


@pytest.mark.parametrize(
    ("shape", "floor", "middle"),
    [
        ("linear", 0.0, 0.5),
        ("one_minus_sqrt", 0.0, 0.2929),
        ("one_minus_square", 0.0, 0.75),
        ("exponential", 0.1, 0.3162),
        ("inverse", 0.1, 0.1818),
        ("cosine", 0.0, 0.5),
        ("cosine", 0.2, 0.5 + 0.5 * 0.2),
    ],
)
def test_shapes_at_start_middle_and_end(shape: str, floor: float, middle: float) -> None:
    schedule = decay_to(shape, floor)
    assert schedule.factor(30) == 1.0
    assert schedule.factor(30 + 500) == pytest.approx(middle, abs=5e-5)
    assert schedule.factor(30 + 1000) == pytest.approx(floor, abs=1e-15)
    assert schedule.factor(30 + 5000) == schedule.factor(30 + 1000)


@pytest.mark.parametrize("shape", SHAPES[1:])
@settings(deadline=None)
@given(x=st.integers(1, 1000), floor=st.floats(0.01, 1.0))
def test_shapes_follow_their_formulas(shape: str, x: int, floor: float) -> None:
    share = x / 1000
    formula = {
        "exponential": math.exp(share * math.log(floor)),
        "linear": 1 - (1 - floor) * share,
        "cosine": floor + (1 - floor) * math.cos(math.pi * share / 2) ** 2,
        "one_minus_sqrt": floor + (1 - floor) * (1 - share**0.5),
        "one_minus_square": floor + (1 - floor) * (1 - share**2),
        "inverse": 1 / (share / floor + (1 - share)),
    }[shape]
    assert decay_to(shape, floor).factor(30 + x) == pytest.approx(formula, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_warmup_and_stable(shape: str) -> None:
    schedule = WSD(10, 20, 1000, shape, half_life=50 if shape == "half_life" else None)
    assert [schedule.factor(step) for step in range(1, 11)] == [step / 10 for step in range(1, 11)]
    assert {schedule.factor(step) for step in range(10, 31)} == {1.0}
    assert schedule.factor(31) < 1.0


# MiniCPM-2B-history: (start of the decay, half-life) -> {step: share of the peak}, four digits where published so.
@pytest.mark.parametrize(
    ("start", "half_life", "published", "digits"),
    [
        (261000, 5000, {270000: 0.2872, 279500: 0.0769, 280000: 0.0718, 290000: 0.0179, 300000: 0.0045}, 4),
        (261000, 8000, {270000: 0.46, 279500: 0.20, 280000: 0.19}, 2),
        (263000, 5000, {270000: 0.38, 279500: 0.10, 280000: 0.095}, 2),
        (263000, 8000, {270000: 0.55, 279500: 0.24, 280000: 0.23}, 2),
    ],
)
def test_published_rates(start: int, half_life: int, published: dict[int, float], digits: int) -> None:
    schedule = WSD(1000, start - 1000, 40000, "half_life", half_life=half_life)
    assert schedule.factor(260000) == 1.0
    assert schedule.factor(start + half_life) == 0.5
    for step, value in published.items():
        assert schedule.factor(step) == pytest.approx(value, abs=0.51 * 10.0**-digits)


def test_cosine_is_that_of_optax() -> None:
    oracle = optax.cosine_decay_schedule(1.0, decay_steps=500, alpha=0.1)
    steps = np.arange(0, 700)
    np.testing.assert_allclose(Cosine(0, 500, 0.1).factor(steps), oracle(steps), atol=1e-6)


def test_linear_is_that_of_optax() -> None:
    oracle = optax.join_schedules(
        [optax.linear_schedule(0, 1, 50), optax.constant_schedule(1), optax.linear_schedule(1, 0.1, 200)], [50, 150]
    )
    steps = np.arange(0, 500)
    schedule = WSD(50, 100, 200, "linear", 0.1)
    np.testing.assert_allclose(schedule.factor(steps), [oracle(step) for step in steps], atol=1e-6)


def test_cosine_loop_swings() -> None:
    loop, cosine = CosineLoop(10, 1000, 0.1, half_period=100), Cosine(10, 100, 0.1)
    for step in range(1, 111):
        assert loop.factor(step) == cosine.factor(step)
    for swing in range(10):
        assert loop.factor(10 + 100 * swing) == pytest.approx(0.1 if swing % 2 else 1.0, abs=1e-15)
        assert loop.factor(60 + 100 * swing) == pytest.approx(0.55, abs=1e-12)
    assert loop.total == 1010


def test_every_cycle_of_wsd_s_is_a_wsd() -> None:
    cycles = WSDS(10, ((30, 20), (40, 10)), "linear", 0.1)
    first = WSD(10, 30, 20, "linear", 0.1)
    second = WSD(0, 40, 10, "linear", 0.1)
    assert [cycles.factor(step) for step in range(1, 61)] == [first.factor(step) for step in range(1, 61)]
    assert [cycles.factor(60 + step) for step in range(1, 51)] == [second.factor(step) for step in range(1, 51)]
    assert [stage.name for stage in cycles.stages()] == ["warmup", "stable", "decay", "stable", "decay"]


@pytest.mark.parametrize(
    "schedule",
    [
        *(decay_to(shape, 0.1) for shape in SHAPES[1:]),
        WSD(1000, 260000, 40000, "half_life", half_life=5000),
        WSD(1000, 200000, 99000, "one_minus_sqrt", 0.1),
        WSDS(),
        Cosine(3000, 297000),
        CosineLoop(3000, 297000, 0.1, half_period=77),
        Constant(),
    ],
)
def test_float32_under_jit_equals_float64(schedule: Schedule) -> None:
    steps = np.unique(np.concatenate([np.arange(1, 3000), np.linspace(1, 300000, 20000, dtype=int)]))
    exact = schedule.factor(steps)
    compiled = jax.jit(schedule.factor)(jnp.asarray(steps, dtype=jnp.int32))
    assert exact.dtype == np.float64 and compiled.dtype == jnp.float32
    np.testing.assert_allclose(compiled, exact, atol=1e-6)
    one = jax.jit(schedule.factor)(jnp.int32(12345))
    assert one.shape == () and float(one) == pytest.approx(schedule.factor(12345), abs=1e-6)
    assert isinstance(schedule.factor(12345), float)


@settings(deadline=None)
@given(schedules)
def test_stages_hold_every_update_once(schedule: Schedule) -> None:
    held = [step for stage in schedule.stages() for step in range(stage.first, stage.last + 1)]
    assert held == list(range(1, schedule.total + 1))
    for stage in schedule.stages():
        assert schedule.stage(stage.first) == schedule.stage(stage.last) == stage.name
    assert schedule.stage(schedule.total + 1) == schedule.stages()[-1].name


@settings(deadline=None)
@given(schedules)
def test_shares_lie_in_0_to_1_and_stay_at_the_end(schedule: Schedule) -> None:
    steps = np.arange(0, schedule.total + 10)
    shares = schedule.factor(steps)
    assert np.all((shares >= 0) & (shares <= 1))
    scalars = [schedule.factor(int(step)) for step in steps]
    assert set(scalars[schedule.total :]) == {scalars[schedule.total]}
    np.testing.assert_allclose(shares, scalars, rtol=1e-14)  # powers of a vector may differ in the last bit


@settings(deadline=None)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400), st.integers(20, 400)), st.sampled_from(SHAPES[2:5]), floor)
def test_no_jump_at_the_boundaries(lengths: tuple[int, int, int], shape: str, floor: float) -> None:
    """The steepest shape, 1 - sqrt x, falls by 1 / sqrt(decay) at once; the others by at most pi / 2 / decay."""
    warmup, stable, decay = lengths
    schedule = WSD(warmup, stable, decay, shape, floor)
    allowed = decay**-0.5 if shape == "one_minus_sqrt" else math.pi / 2 / decay
    assert 1 - schedule.factor(warmup + stable + 1) <= allowed + 1e-12
    assert schedule.factor(warmup + 1) - schedule.factor(warmup) == 0


def in_tokens(schedule: Schedule, tokens_per_step: int) -> Schedule:
    """The same schedule said in tokens."""

    def scale(value: object) -> object:
        return tuple(map(scale, value)) if isinstance(value, tuple) else value * tokens_per_step

    keys = [field.name for field in dataclasses.fields(schedule) if field.name not in ("unit", "shape", "floor")]
    scaled = {key: scale(getattr(schedule, key)) for key in keys if getattr(schedule, key) is not None}
    return dataclasses.replace(schedule, unit="tokens", **scaled)


@settings(deadline=None)
@given(schedules, st.sampled_from([1, 2, 256, 4096]))
def test_tokens_are_steps_times_tokens_per_step(schedule: Schedule, tokens_per_step: int) -> None:
    assert in_tokens(schedule, tokens_per_step).in_steps(BatchSizes(tokens_per_step)) == schedule
    assert schedule.in_steps(BatchSizes(tokens_per_step)) is schedule


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 100_000)] * 3), st.integers(1, 5000))
def test_boundaries_in_tokens_are_rounded_up(lengths: tuple[int, int, int], tokens_per_step: int) -> None:
    schedule = WSD(*lengths, unit="tokens").in_steps(BatchSizes(tokens_per_step))
    ends = (schedule.warmup, schedule.warmup + schedule.stable, schedule.total)
    exact = np.cumsum(lengths) / tokens_per_step
    assert all(0 <= end - true < 1 for end, true in zip(ends, exact, strict=True))


def test_half_life_in_tokens_may_be_a_fraction_of_a_step() -> None:
    schedule = WSD(100, 900, 1000, "half_life", half_life=250.0, unit="tokens").in_steps(BatchSizes(100))
    assert schedule.half_life == 2.5 and schedule.factor(10 + 5) == 0.25


def test_a_schedule_in_tokens_has_no_steps() -> None:
    schedule = WSD(unit="tokens")
    for ask in (lambda: schedule.factor(1), schedule.stages, lambda: schedule.total, lambda: schedule.branch(500)):
        with pytest.raises(ValueError, match="in_steps"):
            ask()


@settings(deadline=None)
@given(st.integers(0, 2000), st.sampled_from(SHAPES))
def test_branch_decays_right_after_its_step(step: int, shape: str) -> None:
    trunk = WSD(100, 5000, 50, shape, half_life=7.0 if shape == "half_life" else None)
    if step < 100:
        with pytest.raises(UserError, match=r"^branch.step = \d+: expected 100"):
            trunk.branch(step)
        return
    branch = trunk.branch(step)
    decay = [branch.factor(step + k) for k in range(1, 51)]
    assert branch.factor(step) == 1.0 and branch.total == step + 50
    assert decay == [trunk.factor(5100 + k) for k in range(1, 51)]


def test_empty_stages_are_left_out() -> None:
    assert WSD(0, 0, 7).stages() == (Stage("decay", 1, 7),)
    assert Constant(0, 5).stages() == (Stage("stable", 1, 5),)
    assert Constant(0, 5).factor(np.arange(1, 6)).tolist() == [1.0] * 5


def test_rewarmup() -> None:
    assert [rewarmup(step, 100, 4) for step in range(101, 107)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rewarmup(101, 100, 0) == 1.0
    np.testing.assert_allclose(jax.jit(lambda step: rewarmup(step, 100, 4))(jnp.arange(101, 104)), [0.25, 0.5, 0.75])


@pytest.mark.parametrize(
    ("schedule", "key"),
    [
        (WSD(-1), "warmup"),
        (WSD(0, 0, 0), "decay"),
        (WSD(floor=1.5), "floor"),
        (WSD(floor=0.0), "floor"),
        (WSD(shape="inverse", floor=0.0), "floor"),
        (WSD(shape="half_life"), "half_life"),
        (WSD(shape="half_life", half_life=0.0), "half_life"),
        (WSD(shape="linear", half_life=5.0), "half_life"),
        (WSDS(cycles=()), "cycles"),
        (WSDS(cycles=((5, -1),)), "cycles"),
        (WSDS(0, ((0, 0),)), "cycles"),
        (Cosine(floor=-0.1), "floor"),
        (CosineLoop(half_period=0), "half_period"),
        (Constant(0, 0), "length"),
    ],
)
def test_impossible_values_are_named(schedule: Schedule, key: str) -> None:
    assert key in [name for name, _ in schedule.problems()]


def test_defaults_and_zero_floor_are_possible() -> None:
    for schedule in (WSD(), WSDS(), Cosine(), CosineLoop(), Constant(), WSD(shape="linear", floor=0.0)):
        assert list(schedule.problems()) == []
