"""The figures of a study of schedules: the paper's Figures 4 and 5 in small, and all that ends at S, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpmjax.tunnel.figures import panels
from cpmjax.tunnel.paired import t_interval
from cpmjax.tunnel.schedules import Segments, rates
from cpmjax.tunnel.schedules_report import EARLY_DECAYS, PERIODS, WSD, Comparison, Line

Plan = dict[str, Segments]

_INK, _DECAY, _COSINE, _AGAIN = "#374151", "#2563eb", "#dc2626", "#059669"
_COLORS = {"constant": _INK, "wsd-s": _AGAIN, "lawa": "#d97706", "wsm": "#d97706", "cosine": _COSINE, "wsd": _DECAY}
_FROM = 0.2  # of S: where the axis of the losses begins, which fall too far before that


def periods(found: Comparison, plan: Plan) -> Any:
    """Cosines whose half period is half of S, S and twice S, and the loop, all at the same peak: loss, and rate below.

    Means over the seeds: what seeds have in common cancels between curves, `ends` has the intervals.
    """
    peak = found.best("cosine").peak
    figure, losses, shares = _two_panels(found.line(WSD).end)
    short = found.line("cosine(S/2)", peak)
    drawn: list[tuple[Line, str, str, Line | None]] = [
        (found.line("cosine", peak), _COSINE, "cosine(S)", None),
        (short, _DECAY, "", None),
        (found.line(PERIODS[0], peak), _DECAY, PERIODS[0], short),
        (found.line(PERIODS[1], peak), _INK, f"{PERIODS[1]}, cut off", None),
        (found.line("cosine-loop", peak), _AGAIN, "cosine-loop", None),
    ]
    for line, color, label, before in drawn:
        _curve(losses, line, color, label and f"{label}: {line.ends_R.mean():.3f} at S", before)
        _rate(shares, plan[line.run], color, line)
    return _finished(figure, losses, shares, f"cosine(T) with a peak of {peak:g}")


def branches(found: Comparison, plan: Plan) -> Any:
    """The trunk, decays that leave it, WSD-S, the cosine at its best peak: loss, mean over the seeds; rate below."""
    figure, losses, shares = _two_panels(found.line(WSD).end)
    trunk, cosine = found.line("constant"), found.best("cosine")
    first = found.line(EARLY_DECAYS[0])
    drawn: list[tuple[Line, str, str, Line | None]] = [
        (trunk, _INK, "constant, the trunk", None),
        (cosine, _COSINE, f"cosine, peak {cosine.peak:g}", None),
        *((found.line(method), _DECAY, "wsd 10%, ending there", trunk) for method in (*EARLY_DECAYS, WSD)),
        (found.line("wsd 2.5%"), "#93c5fd", "wsd 2.5%", trunk),
        (found.line("wsd 20%"), "#1e3a8a", "wsd 20%", trunk),
        (found.line("wsd-s"), _AGAIN, "wsd-s, from the decay at 50%", found.line("wsd 10% ending at 50%")),
    ]
    for line, color, label, before in drawn:
        repeated = color == _DECAY and line is not first
        _curve(losses, line, color, "" if repeated else label, before)
        _rate(shares, plan[line.run], color, line)
    return _finished(figure, losses, shares, f"one trunk with a peak of {found.peak:g}, its decays, and a cosine")


def ends(found: Comparison) -> Any:
    """Held-out loss of all that ends at S less that of the decay of a tenth, on the same rows: each seed, the mean and
    its 95 % t-interval; and the steps that each took, before those that it would take from its beginning."""
    wsd = found.line(WSD)
    lines = [line for line in found.lines.values() if line.end == wsd.end and line.finished]
    lines.sort(key=lambda line: -float(line.ends_R.mean()))
    figure, ((differences, steps),) = panels(1, 2, 4.8, 0.2 * len(lines) + 0.6)
    for row, line in enumerate(lines):
        color = next(color for kind, color in _COLORS.items() if line.method.startswith(kind))
        each = t_interval(line.ends_R - wsd.ends_R)
        differences.plot(line.ends_R - wsd.ends_R, [row] * len(wsd.ends_R), "|", color=color, alpha=0.5)
        differences.plot([each.low, each.high], [row, row], color=color, linewidth=1.6)
        differences.plot(each.value, row, "o", color=color, markersize=5)
        steps.barh(row, line.end, color="#e5e7eb")
        steps.barh(row, line.end - line.after, color=color)
    names = [f"{line.method}, peak {line.peak:g}" for line in lines]
    differences.set_yticks(range(len(lines)), names, fontsize=8)
    differences.axvline(0, color="#9ca3af", linewidth=0.8)
    mean = f"{wsd.ends_R.mean():.3f}"
    differences.set_xlabel(f"held-out loss less that of {WSD}, {mean} (nats per token)", fontsize=9)
    steps.set_yticks([])
    steps.set_xlabel("steps trained; grey: each from its beginning", fontsize=9)
    for panel in (differences, steps):
        panel.set_ylim(-0.6, len(lines) - 0.4)
        panel.grid(color="#eeeeee", linewidth=0.6, axis="x")
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _two_panels(total: int) -> tuple[Any, Any, Any]:
    figure, grid = panels(2, 1, 8.0, 2.9)
    (losses,), (shares,) = grid
    losses.get_gridspec().set_height_ratios([3, 1])
    for panel in (losses, shares):
        panel.set_xlim(0, 1.01 * total)
        panel.grid(color="#eeeeee", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, losses, shares


def _curve(panel: Any, line: Line, color: str, label: str, before: Line | None) -> None:
    """Its losses, if it came to its end; a branch begins with that of its trunk where it left it."""
    if not line.finished:
        return
    steps, losses = list(line.steps), list(line.losses_TR.mean(axis=1))
    if before is not None:
        steps = [line.after, *steps]
        losses = [np.interp(line.after, before.steps, before.losses_TR.mean(axis=1)), *losses]
    panel.plot(steps, losses, color=color, linewidth=1.5, label=label or None)


def _rate(panel: Any, segments: Segments, color: str, line: Line) -> None:
    """The rates of its own updates, from the last one of its trunk on."""
    first = max(line.after - 1, 0)
    if line.finished:
        panel.plot(np.arange(first, line.end) + 1, rates(segments)[first:], color=color, linewidth=1.2)


def _finished(figure: Any, losses: Any, shares: Any, title: str) -> Any:
    curves: Sequence[Any] = losses.get_lines()
    seen = [y for c in curves for x, y in zip(*c.get_data(), strict=True) if x >= _FROM * losses.get_xlim()[1]]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    if np.isfinite([low, high]).all() and low < high:
        losses.set_ylim(low - 0.1 * (high - low), high + 0.05 * (high - low))
    losses.set_title(title, fontsize=11, fontweight="bold", loc="left")
    losses.set_ylabel("held-out loss (nats per token)", fontsize=9)
    losses.legend(fontsize=8, frameon=False)
    shares.set_ylabel("learning rate", fontsize=9)
    shares.set_xlabel("step", fontsize=9)
    return figure
