"""Warmup, stable, decay as data: which share of the peak learning rate each update gets, and which stage it is in.

Steps are the numbers of the updates, counted from 1: update s is made with rate(s), and the checkpoint of step s has
seen s updates. A schedule is a row of pieces; a piece that follows step s0 and lasts D updates holds s0 < s <= s0 + D
and has reached its end, x = (s - s0) / D = 1, at its last update. After the last piece the rate stays where it ended.

Sources: WSD and the half-life form, Hu et al. 2404.06395 (eq. 1, read as 0.5^((s - s0) / half_life)); 1-sqrt and the
cooldown shapes, Haegele et al. 2405.18392; WSD-S and the inverse shape, Wen et al. 2410.05192.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import draccus
import numpy as np

from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.errors import UserError

Shape = Literal["half_life", "exponential", "linear", "cosine", "one_minus_sqrt", "one_minus_square", "inverse"]


@dataclass(frozen=True)
class Stage:
    """Updates `first` to `last`, both included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class _Piece:
    name: str
    length: int
    share: Callable[[Any, Any], Any]  # (updates since its start, array namespace) -> share of the peak


def _warmup(length: int) -> _Piece:
    return _Piece("warmup", length, lambda elapsed, xp: elapsed / length)


def _stable(length: int) -> _Piece:
    return _Piece("stable", length, lambda elapsed, xp: xp.ones_like(elapsed, dtype=float))


def _cosine(elapsed: Any, half_period: int, floor: float, xp: Any) -> Any:
    # The remainder is taken on integers: in float32 the cosine of a large angle would lose its digits.
    angle = math.pi * (elapsed % (2 * half_period)) / half_period
    return floor + (1 - floor) * (1 + xp.cos(angle)) / 2


# Progress x in (0, 1] and the array namespace -> what is left of the way from the peak to the floor.
_TO_FLOOR: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda x, xp: 1 - x,
    "cosine": lambda x, xp: (1 + xp.cos(math.pi * x)) / 2,
    "one_minus_sqrt": lambda x, xp: 1 - xp.sqrt(x),
    "one_minus_square": lambda x, xp: 1 - x * x,
}


def _decay(length: int, shape: Shape, floor: float, half_life: float | None) -> _Piece:
    def share(elapsed: Any, xp: Any) -> Any:
        if shape == "half_life":
            return 0.5 ** (elapsed / half_life)
        x = elapsed / length
        if shape == "exponential":
            return floor**x
        if shape == "inverse":
            return floor / (x + floor * (1 - x))
        return floor + (1 - floor) * _TO_FLOOR[shape](x, xp)

    return _Piece("decay", length, share)


def _decay_problems(shape: Shape, floor: float, half_life: float | None) -> Iterator[tuple[str, str]]:
    if not 0 <= floor <= 1:
        yield "floor", "a share of the peak, from 0 to 1"
    elif shape in ("exponential", "inverse") and floor == 0:
        yield "floor", f"more than 0 with shape {shape}, which never reaches 0"
    if shape == "half_life" and not (half_life is not None and half_life > 0):
        yield "half_life", "a positive number with shape half_life"
    if shape != "half_life" and half_life is not None:
        yield "half_life", f"null with shape {shape}"


def _in_steps(lengths: Sequence[int], batches: BatchSizes) -> list[int]:
    """Lengths in tokens, one after the other -> lengths in steps: each boundary is rounded up, not each length."""
    ends = [batches.steps(end) for end in itertools.accumulate(lengths)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def _tokens_per_step(key: str, batches: BatchSizes, after: int, last: int) -> int:
    """Of the updates that follow `after`, for a length in tokens that repeats there. Raises UserError if it changes."""
    sizes = batches.used(after, max(last, after + 1))
    if len(sizes) > 1:
        raise UserError(
            f"schedule.{key} in tokens: expected batches of one size where it holds, steps {after + 1} to {last}, not "
            f"{' and '.join(map(str, sizes))} rows (training.batch_warmup); in steps it may be anything"
        )
    return sizes[0] * batches.row_tokens


@dataclass(frozen=True)
class Schedule(draccus.ChoiceRegistry):
    """The shape of a run's learning rate; `type` in the YAML chooses the kind.

    All lengths count `unit`. A schedule in tokens has no steps: `in_steps` comes before everything else.
    """

    unit: Literal["steps", "tokens"] = dataclasses.field(default="steps", kw_only=True)

    def _pieces(self) -> list[_Piece]:
        raise NotImplementedError

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        raise NotImplementedError

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, what is allowed) for each impossible value."""
        raise NotImplementedError

    def in_steps(self, batches: BatchSizes) -> Self:
        """The same schedule counted in steps, each boundary rounded up to a whole step; between boundaries, progress is
        that of the steps also where batches grow. Raises UserError if they do while a half-life or half-period holds.
        """
        if self.unit == "steps":
            return self
        return dataclasses.replace(self, unit="steps", **self._lengths_in_steps(batches))

    def _require_steps(self) -> None:
        if self.unit != "steps":
            raise ValueError("a schedule in tokens has no steps: call in_steps(batches) first")

    def _timeline(self) -> Iterator[tuple[int, _Piece]]:
        """Every piece that is not empty, with the number of updates before it."""
        self._require_steps()
        start = 0
        for piece in self._pieces():
            if piece.length:
                yield start, piece
                start += piece.length

    def factor(self, step: Any) -> Any:
        """Share of the peak rate, 0 to 1, that update `step` gets.

        An int gives a float (computed in float64), a numpy array of integers a numpy array, a jax array or tracer
        of int32 a jax array of the same shape: safe under jit.
        """
        xp = step.__array_namespace__() if hasattr(step, "__array_namespace__") else np
        share: Any = 1.0
        for start, piece in self._timeline():
            here = piece.share(xp.clip(step - start, 0, piece.length), xp)
            share = here if start == 0 else xp.where(step > start, here, share)
        return float(share) if isinstance(step, int) else share

    @property
    def total(self) -> int:
        """How many updates the run has."""
        return sum(piece.length for _, piece in self._timeline())

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, without the empty ones; together they hold every update from 1 to `total` once."""
        return tuple(Stage(piece.name, start + 1, start + piece.length) for start, piece in self._timeline())

    def stage(self, step: int) -> str:
        """The name of the stage that update `step` is in; after the end, that of the last one."""
        stages = self.stages()
        return next((stage.name for stage in stages if step <= stage.last), stages[-1].name)

    def _length_problems(self, *keys: str) -> Iterator[tuple[str, str]]:
        for key in keys:
            if getattr(self, key) < 0:
                yield key, f"0 {self.unit} or more"
        if sum(max(getattr(self, key), 0) for key in keys) == 0:
            yield keys[-1], "a schedule of at least one step"


@Schedule.register_subclass("wsd")
@dataclass(frozen=True)
class WSD(Schedule):
    """Linear warmup, the peak, one decay.

    With x the progress in the decay and r the floor, the shapes are: half_life 0.5^((s - s0) / half_life), which knows
    no floor; exponential r^x; inverse 1 / (x / r + 1 - x); and r + (1 - r) g with g = 1 - x (linear),
    (1 + cos pi x) / 2 (cosine), 1 - sqrt x (one_minus_sqrt), 1 - x^2 (one_minus_square).
    """

    warmup: int = 100
    stable: int = 900
    decay: int = 100
    shape: Shape = "exponential"
    floor: float = 0.1  # final rate as a share of the peak
    half_life: float | None = None  # for shape half_life: after how long the rate is halved

    def _pieces(self) -> list[_Piece]:
        decay = _decay(self.decay, self.shape, self.floor, self.half_life)
        return [_warmup(self.warmup), _stable(self.stable), decay]

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        warmup, stable, decay = _in_steps((self.warmup, self.stable, self.decay), batches)
        after = warmup + stable
        half_life = self.half_life and self.half_life / _tokens_per_step("half_life", batches, after, after + decay)
        return {"warmup": warmup, "stable": stable, "decay": decay, "half_life": half_life}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._length_problems("warmup", "stable", "decay")
        yield from _decay_problems(self.shape, self.floor, self.half_life)

    def branch(self, step: int) -> WSD:
        """The same schedule with the decay beginning right after `step`; counted in steps.

        Raises UserError for a step inside the warmup.
        """
        self._require_steps()
        if step < self.warmup:
            raise UserError(f"branch.step = {step}: expected {self.warmup}, the end of the warmup, or later")
        return dataclasses.replace(self, stable=step - self.warmup)


@Schedule.register_subclass("wsd_s")
@dataclass(frozen=True)
class WSDS(Schedule):
    """WSD-S: warmup, then cycles of (stable, decay); each goes on at the peak from the weights decayed before it."""

    warmup: int = 100
    cycles: tuple[tuple[int, int], ...] = ((450, 50), (450, 50))  # (stable, decay) of each
    shape: Shape = "inverse"
    floor: float = 0.1  # final rate of each decay as a share of the peak
    half_life: float | None = None  # for shape half_life: after how long the rate is halved

    def _pieces(self) -> list[_Piece]:
        pieces = [_warmup(self.warmup)]
        for stable, decay in self.cycles:
            pieces += [_stable(stable), _decay(decay, self.shape, self.floor, self.half_life)]
        return pieces

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        warmup, *rest = _in_steps((self.warmup, *itertools.chain(*self.cycles)), batches)
        after, last = warmup + rest[0], warmup + sum(rest)
        half_life = self.half_life and self.half_life / _tokens_per_step("half_life", batches, after, last)
        return {"warmup": warmup, "cycles": tuple(zip(rest[::2], rest[1::2], strict=True)), "half_life": half_life}

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.warmup < 0:
            yield "warmup", f"0 {self.unit} or more"
        if not self.cycles or min(min(stable, decay) for stable, decay in self.cycles) < 0:
            yield "cycles", f"at least one [stable, decay], each 0 {self.unit} or more"
        elif self.warmup + sum(stable + decay for stable, decay in self.cycles) <= 0:
            yield "cycles", "a schedule of at least one step"
        yield from _decay_problems(self.shape, self.floor, self.half_life)


@Schedule.register_subclass("cosine")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warmup, then half a cosine from the peak to the floor."""

    warmup: int = 100
    length: int = 1000  # after the warmup
    floor: float = 0.1  # final rate as a share of the peak

    def _pieces(self) -> list[_Piece]:
        cosine = _Piece("cosine", self.length, lambda elapsed, xp: _cosine(elapsed, self.length, self.floor, xp))
        return [_warmup(self.warmup), cosine]

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        warmup, length = _in_steps((self.warmup, self.length), batches)
        return {"warmup": warmup, "length": length}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._length_problems("warmup", "length")
        if not 0 <= self.floor <= 1:
            yield "floor", "a share of the peak, from 0 to 1"


@Schedule.register_subclass("cosine_loop")
@dataclass(frozen=True)
class CosineLoop(Cosine):
    """Linear warmup, then a cosine that swings between the peak and the floor for as long as the run lasts."""

    half_period: int = 250  # from the peak to the floor

    def _pieces(self) -> list[_Piece]:
        cosine = _Piece("cosine", self.length, lambda elapsed, xp: _cosine(elapsed, self.half_period, self.floor, xp))
        return [_warmup(self.warmup), cosine]

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        lengths = super()._lengths_in_steps(batches)
        warmup, length = lengths["warmup"], lengths["length"]
        tokens = _tokens_per_step("half_period", batches, warmup, warmup + length)
        return lengths | {"half_period": -(-self.half_period // tokens)}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.half_period < 1:
            yield "half_period", f"1 {self.unit.removesuffix('s')} or more"


@Schedule.register_subclass("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """Linear warmup, then the peak."""

    warmup: int = 100
    length: int = 1000  # after the warmup

    def _pieces(self) -> list[_Piece]:
        return [_warmup(self.warmup), _stable(self.length)]

    def _lengths_in_steps(self, batches: BatchSizes) -> dict[str, Any]:
        warmup, length = _in_steps((self.warmup, self.length), batches)
        return {"warmup": warmup, "length": length}

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from self._length_problems("warmup", "length")


def rewarmup(step: Any, start: int, length: int) -> Any:
    """Share of the scheduled rate for update `step` of a run that started after `start` with fresh moments.

    Rises in a line to 1 over `length` updates. Types as in `Schedule.factor`.
    """
    if length == 0:
        return 1.0
    xp = step.__array_namespace__() if hasattr(step, "__array_namespace__") else np
    share = xp.clip((step - start) / length, 0.0, 1.0)
    return float(share) if isinstance(step, int) else share
