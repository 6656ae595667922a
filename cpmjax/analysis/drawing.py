"""What the figures of all studies share: bands for the stages, the learning rate beside, a mark for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpmjax.checkpoint.series import Series
from cpmjax.run import plots

_RATE = "#8a8a8a"
_MARKS = {
    "warmup": ("#b45309", "^"),
    "stable": ("#15803d", "o"),
    "decay": ("#1f5f9e", "v"),
    "cosine": ("#7e22ce", "D"),
    "imported": ("#4b5563", "s"),  # a checkpoint whose schedule nobody knows
}


def bands(axes: Any, series: Series, names: bool = True) -> None:
    """Shades the stages of the schedule, as far as the horizontal axis (steps) reaches once everything is drawn on it.

    Nothing is shaded where nobody knows the schedule. `names=False` leaves the names out, for panels beside others.
    """
    limits = axes.get_xlim()
    plots.shade(axes, series.stages(), names)
    axes.set_xlim(limits)


def rate(axes: Any, series: Series, steps: Sequence[int] | None = None) -> Any:
    """Draws the learning rate of the base width, from the first to the last of `steps`, on an axis at the right.

    Every update's where the series has a log, else that of its checkpoints. Returns the axis; None, and draws nothing,
    where nobody knows a rate.
    """
    steps = series.steps if steps is None else sorted(steps)
    logged = [(record["step"], record["learning_rate"]) for record in series.log() if "learning_rate" in record]
    found = logged or [(step, series.learning_rate(step)) for step in steps]
    shown = [(step, value) for step, value in found if value is not None and steps[0] <= step <= steps[-1]]
    if not shown:
        return None
    twin = axes.twinx()
    twin.plot(*zip(*shown, strict=True), color=_RATE, linewidth=1, linestyle="--" if logged else ":")
    twin.set_ylim(0, 1.15 * max(value for _, value in shown))  # room for the names of the stages
    twin.set_ylabel("learning rate", color=_RATE)
    twin.tick_params(axis="y", colors=_RATE)
    twin.spines["top"].set_visible(False)
    return twin


def mark(stage: str) -> dict[str, str]:
    """The colour and marker of a checkpoint's point, by its stage: keywords of `plot` and `scatter`."""
    color, marker = _MARKS[stage]
    return {"color": color, "marker": marker}
