"""Curves of a run, drawn as it goes: the loss and the learning rate over the steps, with the stages shaded."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.run.directory import RunDirectory, write_atomically
from cpmjax.run.schedule import Stage

Records = Sequence[dict[str, Any]]

SHADES = {"warmup": "#fbf0dc", "stable": "#f4f6f4", "decay": "#deebf7", "cosine": "#f4f6f4"}
_OWN, _PARENT = "#1f5f9e", "#8a8a8a"
_HELD_OUT = ("#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0f766e")


def draw(records: Records, stages: Sequence[Stage], directory: str | Path, parent_records: Records = ()) -> None:
    """Writes plots/loss.png and plots/learning_rate.png of the run in `directory`.

    `records` are those of metrics.jsonl: step, tokens, loss (nats per token), learning_rate; at evaluations also
    heldout_loss and heldout/CORPUS. A branch shows `parent_records`, as far as its own begin, in grey. Values that
    are not finite are left out.
    """
    run = RunDirectory(directory)
    run.plots.mkdir(parents=True, exist_ok=True)
    first = min((record["step"] for record in records), default=math.inf)
    parent = [record for record in parent_records if record["step"] < first]
    for name, content in (("loss", _loss), ("learning_rate", _learning_rate)):
        write_atomically(run.plots / f"{name}.png", _figure(content, records, parent, stages, run.path.resolve().name))


def _series(records: Iterable[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that hold a finite number under `key`."""
    points = [(record["step"], record[key]) for record in records if math.isfinite(record.get(key, math.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return (sums[last] - sums[first]) / (last - first)


def _figure(content: Any, records: Records, parent: Records, stages: Sequence[Stage], name: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    content(axes, records, parent)

    steps = [record["step"] for record in (*parent, *records)]
    first, end = min(steps, default=0), max(steps, default=0)
    axes.set_xlim(first, end + 0.01 * (end - first) + 1)  # room for half a marker
    axes.set_xlabel(f"step{_tokens_each(records)}", fontsize=12)
    axes.set_title(name, fontsize=14, fontweight="bold", loc="left", pad=10)
    axes.tick_params(labelsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    shade(axes, stages)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)

    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _tokens_each(records: Records) -> str:
    """How many tokens a step takes: one number, or two where the batch changes."""
    known = sorted({record["step"]: record["tokens"] for record in records if record.get("tokens")}.items())
    pairs = list(itertools.pairwise(known)) or [((0, 0), place) for place in known if place[0]]
    sizes = [(tokens - before) / (step - start) for (start, before), (step, tokens) in pairs]
    each = dict.fromkeys(f"{size:,.0f}" for size in (min(sizes, default=0), max(sizes, default=0)) if size)
    return f" ({' to '.join(each)} tokens each)" if each else ""


def shade(axes: Any, stages: Sequence[Stage], names: bool = True) -> None:
    """Shades each stage as far as the horizontal axis shows it now, and names it at the top."""
    left, right = axes.get_xlim()
    for stage in stages:
        start, end = max(stage.first - 1, left), min(stage.last, right)
        if start >= end:
            continue
        axes.axvspan(start, end, color=SHADES[stage.name], linewidth=0, zorder=0)
        if not names:
            continue
        narrow = (end - start) < 0.08 * (right - left)
        axes.annotate(
            stage.name,
            ((start + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -6),
            textcoords="offset points",
            rotation=90 if narrow else 0,
            horizontalalignment="center",
            verticalalignment="top",
            fontsize=10,
            color="#666666",
        )


def _loss(axes: Any, records: Records, parent: Records) -> None:
    parent_steps, parent_values = _series(parent, "loss")
    steps, values = _series(records, "loss")
    parent_mean, mean = _smooth(parent_values), _smooth(values)
    if len(parent_steps):
        axes.plot(parent_steps, parent_mean, color=_PARENT, linewidth=1.5, label="parent, running mean")
    axes.plot(steps, values, color=_OWN, linewidth=0.5, alpha=0.3, label="training")
    axes.plot(steps, mean, color=_OWN, linewidth=1.8, label="training, running mean")

    heldout_parent = _series(parent, "heldout_loss")
    axes.plot(*heldout_parent, "o", color=_PARENT, markersize=4, label="_parent")
    heldout_steps, heldout = _series(records, "heldout_loss")
    shown = [values, heldout]
    if len(heldout):
        axes.plot(heldout_steps, heldout, "o-", color="black", linewidth=1, markersize=5, label="held out")
    corpora = sorted({key for record in records for key in record if key.startswith("heldout/")})
    for index, key in enumerate(corpora):
        corpus_steps, corpus = _series(records, key)
        color = _HELD_OUT[index % len(_HELD_OUT)]
        label = f"held out, {key.removeprefix('heldout/')}"
        axes.plot(corpus_steps, corpus, "s--", color=color, linewidth=0.8, markersize=3.5, label=label)
        shown.append(corpus)

    _limit_loss(axes, np.concatenate([parent_steps, steps]), np.concatenate([parent_mean, mean]), shown)
    if len(heldout):
        axes.annotate(
            f"{heldout[-1]:.3f}",
            (heldout_steps[-1], heldout[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=11,
            fontweight="bold",
            annotation_clip=False,
        )
    axes.set_ylabel("loss (nats per token)", fontsize=12)


def _smooth(values: np.ndarray) -> np.ndarray:
    return _running_mean(values, max(1, min(len(values) // 20, 100)))


def _limit_loss(axes: Any, steps: np.ndarray, mean: np.ndarray, shown: Sequence[np.ndarray]) -> None:
    """Leaves out the fall of the first 15 % of the steps: beside it nothing later could be seen."""
    if len(steps) == 0:
        return
    later = mean[steps >= steps.min() + 0.15 * np.ptp(steps)]
    top, bottom = later.max(), min(values.min() for values in (later, *shown) if len(values))
    margin = 0.08 * (top - bottom) or 0.1
    axes.set_ylim(bottom - margin, top + 2 * margin)


def _learning_rate(axes: Any, records: Records, parent: Records) -> None:
    parent_steps, parent_rates = _series(parent, "learning_rate")
    steps, rates = _series(records, "learning_rate")
    if len(parent_steps):
        axes.plot(parent_steps, parent_rates, color=_PARENT, linewidth=1.5, label="parent")
    axes.plot(steps, rates, color=_OWN, linewidth=2, label="this run" if len(parent_steps) else "_own")
    axes.set_ylim(0, 1.15 * max([*parent_rates, *rates], default=1.0))  # room for the names of the stages
    axes.set_ylabel("learning rate at the base width", fontsize=12)
