"""The figures of the search: how it went, what mattered, and the losses over pairs of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cpmjax.tunnel.figures import panels
from cpmjax.tunnel.search import FLAT, PARAMETERS, Findings

_ABOVE = (FLAT, 0.05, 0.1)  # nats above the optimum: the lines of the bowl
_WORST_SHOWN = 0.2  # nats above the best that still have a colour of their own
_TOP = 0.25  # nats above the best: where the history ends
_OWN, _BEST = "#d62728", "#111111"
_LABELS = {"learning_rate": "learning rate"}


def all_of(found: Findings, importance: Mapping[str, float]) -> dict[str, Any]:
    """{name of the file: figure}."""
    return {"history": history(found), "importance": importances(found, importance), "contours": contours(found)}


def history(found: Findings) -> Any:
    """The loss of each trial in its order, and the best one so far."""
    figure, ((panel,),) = panels(1, 1, 7.0, 3.6)
    numbers, losses, best = found.numbers_T, found.losses_T, np.minimum.accumulate(found.losses_T)
    top = losses[found.best] + _TOP
    marks = (
        (losses <= top, "o", "#93a3b8", "a trial"),
        (np.isfinite(losses) & (losses > top), "^", "#93a3b8", "a trial that lies higher"),
        (np.isinf(losses), "x", _OWN, "a trial that diverged"),
    )
    for those, mark, color, label in marks:
        if those.any():
            panel.plot(numbers[those], np.minimum(losses[those], top), mark, color=color, markersize=4.5, label=label)
    panel.step(numbers, np.minimum(best, top), where="post", color=_BEST, linewidth=1.6, label="the best so far")
    panel.axhline(losses[0], color=_OWN, linewidth=1.2, linestyle="--", label="the experiment's own values")
    panel.set_xlabel("trial")
    panel.set_ylabel("held-out loss (nats per token)")
    _plain(panel)
    panel.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.97))
    return figure


def importances(found: Findings, importance: Mapping[str, float]) -> Any:
    """Left how narrowly each parameter must be hit for the best fifth, right what a factor of 2 costs in the bowl."""
    figure, ((left, right),) = panels(1, 2, 3.6, 2.6)
    order = sorted(PARAMETERS, key=importance.__getitem__)
    names = [_LABELS.get(name, name) for name in order]
    left.barh(names, [importance[name] for name in order], color="#4c78a8")
    left.set_xlabel("importance (PED-ANOVA, share)", fontsize=9)
    if found.bowl is not None:
        costs = dict(zip(PARAMETERS, found.bowl.octave_costs(), strict=True))
        right.barh(names, [costs[name] for name in order], color="#f58518")
    right.set_xlabel("a factor of 2 costs (nats)", fontsize=9)
    for panel in (left, right):
        _plain(panel)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=5)
    return figure


def contours(found: Findings) -> Any:
    """A panel for each pair: the trials, coloured by their loss, and where the bowl is 0.02, 0.05 and 0.1 nats above
    its optimum with the other parameters there. A cross is the experiment's own values, a star the best trial."""
    pairs = [*itertools.combinations(range(len(PARAMETERS)), 2)]
    figure, grid = panels(2, 3, 3.5, 3.1)
    above = found.losses_T - found.losses_T[found.best]
    order = np.argsort(above)[::-1]  # the best on top
    for (first, second), panel in zip(pairs, grid.flat, strict=True):
        shown = panel.scatter(
            found.values_TD[order, first],
            found.values_TD[order, second],
            c=np.minimum(above[order], _WORST_SHOWN),
            cmap="viridis_r",
            vmin=0.0,
            vmax=_WORST_SHOWN,
            s=18,
            linewidth=0,
        )
        _scale(panel.xaxis, *found.bounds_2D[:, first])
        _scale(panel.yaxis, *found.bounds_2D[:, second])
        if found.bowl is not None:
            _draw_bowl(panel, found, first, second)
        for values_D, mark, size, color, label in (
            (found.values_TD[found.best], "*", 13, _BEST, "the best trial"),
            (found.own, "P", 9, _OWN, "the experiment's own values"),
        ):
            place = values_D[[first, second]]
            panel.plot(*place, mark, color=color, markersize=size, markeredgecolor="white", label=label)
        panel.set_xlabel(_LABELS.get(PARAMETERS[first], PARAMETERS[first]), fontsize=9)
        panel.set_ylabel(_LABELS.get(PARAMETERS[second], PARAMETERS[second]), fontsize=9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.colorbar(shown, ax=grid, label="nats above the best trial", extend="max", shrink=0.7)
    return figure


def _draw_bowl(panel: Any, found: Findings, first: int, second: int) -> None:
    bowl = found.bowl
    assert bowl is not None
    x, y = bowl.line(first, 81), bowl.line(second, 81)
    points_BD = np.tile(bowl.optimum_D, (len(x) * len(y), 1))
    points_BD[:, first], points_BD[:, second] = (each.ravel() for each in np.meshgrid(x, y))
    heights = (bowl(points_BD) - bowl(bowl.optimum_D[None])).reshape(len(y), len(x))
    lines = panel.contour(2.0**x, 2.0**y, heights, levels=_ABOVE, colors="#444444", linewidths=(1.4, 1.0, 0.7))
    panel.clabel(lines, fontsize=7, fmt="%g")


def _scale(axis: Any, low: float, high: float) -> None:
    """Logarithmic from low to high, with 1 and 3 of each decade marked."""
    name = axis.axis_name
    getattr(axis.axes, f"set_{name}scale")("log")
    getattr(axis.axes, f"set_{name}lim")(low / 1.1, high * 1.1)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = [tick for decade in decades for tick in (decade, 3 * decade) if low * 0.99 <= tick <= high * 1.01]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def _plain(panel: Any) -> None:
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
