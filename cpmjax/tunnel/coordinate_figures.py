"""The figure of the coordinate check: coordinates over the size of the model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cpmjax.run.table import Row
from cpmjax.tunnel.coordinate_check import JUDGED, QUANTITIES, STEPS, Slope, base_name
from cpmjax.tunnel.figures import panels

_STEP_COLORS = dict(zip(STEPS, ("#9ca3af", "#93c5fd", "#3b82f6", "#1e3a8a"), strict=True))
_BEYOND = "#fde2e0"  # behind a panel with a judged slope beyond its bar


def coordinates(rows: Iterable[Row], slopes: Sequence[Slope], axis: str) -> Any:
    """For each parametrisation (down) and quantity (across) mean |h - h_0| over the size of the model, by step.

    Of a quantity with layers the last one is drawn. Grey is mean |h| before the first step; a panel is shaded where
    a slope that counts is beyond its bar.
    """
    values: dict[tuple[str, str, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for row in rows:
        if row["axis"] == axis and "quantity" in row and not row["quantity"].startswith("spectral"):
            # Rows come layer by layer: the last layer of a trial replaces the ones before it.
            place = row["parametrisation"], base_name(row["quantity"]), row["step"]
            values[place][row[axis], row["seed"]] = row["change" if row["step"] else "size"]
    names = [*dict.fromkeys(slope.parametrisation for slope in slopes if slope.axis == axis)]
    quantities = [quantity for quantity in QUANTITIES if any(quantity == key[1] for key in values)]
    figure, grid = panels(len(names), len(quantities), 2.3, 2.1)
    for name, line in zip(names, grid, strict=True):
        for quantity, panel in zip(quantities, line, strict=True):
            for step in STEPS:
                found = values[name, quantity, step]
                at = sorted({size for size, _ in found})
                seeds = [[value for (size, _), value in found.items() if size == each] for each in at]
                color = _STEP_COLORS[step]
                label = f"change, step {step}" if step else "size at the start"
                panel.plot(
                    at, [np.mean(each) for each in seeds], "o-", color=color, markersize=3, linewidth=1.3, label=label
                )
                low, high = [min(each) for each in seeds], [max(each) for each in seeds]
                panel.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            mine = [s for s in slopes if (s.parametrisation, s.axis, base_name(s.quantity)) == (name, axis, quantity)]
            if any(slope.judged and not slope.within for slope in mine):
                panel.set_facecolor(_BEYOND)
            steepest = max((slope.value for slope in mine if slope.step in JUDGED), key=abs, default=math.nan)
            panel.set_title(f"steepest {steepest:+.2f}", fontsize=8, color="#555555")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            bottom, top = panel.get_ylim()
            if top / bottom < 16:  # so that what is flat looks flat
                middle = math.sqrt(bottom * top)
                panel.set_ylim(middle / 4, middle * 4)
            panel.tick_params(labelsize=7)
            panel.grid(color="#eeeeee", linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(name, fontsize=10, fontweight="bold")
    for quantity, panel in zip(quantities, grid[0], strict=True):
        panel.annotate(quantity, (0.5, 1.18), xycoords="axes fraction", ha="center", fontsize=10, fontweight="bold")
    for panel in grid[-1]:
        panel.set_xlabel(axis, fontsize=9)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=9
    )
    return figure
