"""The figures of the wind tunnel: coordinates over the size of the model, and loss over the learning rate."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.run.directory import write_atomically
from cpmjax.run.table import Row
from cpmjax.tunnel.coordinate_check import JUDGED, QUANTITIES, STEPS, Slope, base_name
from cpmjax.tunnel.transfer import Family

_STEP_COLORS = dict(zip(STEPS, ("#9ca3af", "#93c5fd", "#3b82f6", "#1e3a8a"), strict=True))
_BEYOND = "#fde2e0"  # behind a panel with a judged slope beyond its bar
_WORST_SHOWN = 0.6  # nats above the worst optimum: what a figure of the transfer still shows


def _figure(rows: int, columns: int, width: float, height: float, sharey: bool = False) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), dpi=90, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())


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
    figure, panels = _figure(len(names), len(quantities), 2.3, 2.1)
    for name, line in zip(names, panels, strict=True):
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
    for quantity, panel in zip(quantities, panels[0], strict=True):
        panel.annotate(quantity, (0.5, 1.18), xycoords="axes fraction", ha="center", fontsize=10, fontweight="bold")
    for panel in panels[-1]:
        panel.set_xlabel(axis, fontsize=9)
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=9
    )
    return figure


def transfer(families: Sequence[Family]) -> Any:
    """A panel for each family: held-out loss at the end over the learning rate, a curve for each size.

    Bands span the seeds, a star marks each size's optimum. A point that diverged, or lies far above, is left out.
    """
    from matplotlib import colormaps

    columns = min(len(families), 3)
    figure, panels = _figure(math.ceil(len(families) / columns), columns, 4.6, 3.8, sharey=True)
    bests = np.array([family.final.min(axis=1) for family in families]).ravel()
    bests = bests[np.isfinite(bests)]
    highest = bests.max(initial=0.0) + _WORST_SHOWN
    for panel, family in zip(panels.flat, families, strict=False):
        shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(family.sizes)))
        for size, color, means, seeds, best in zip(
            family.sizes, shades, family.final, family.losses[-1], family.best, strict=True
        ):
            shown = means < highest
            rates = np.array(family.rates)
            panel.plot(
                rates[shown],
                means[shown],
                "o-",
                color=color,
                markersize=4,
                linewidth=1.6,
                label=f"{family.axis} {size}",
            )
            panel.fill_between(
                rates[shown], seeds.min(axis=1)[shown], seeds.max(axis=1)[shown], color=color, alpha=0.18, lw=0
            )
            panel.plot(rates[best], means[best], "*", color=color, markersize=13, markeredgecolor="white")
        panel.set_xscale("log", base=2)
        panel.set_xticks(family.rates, [f"{rate:g}" for rate in family.rates], rotation=45, fontsize=8)
        panel.minorticks_off()
        title = family.parametrisation + ("" if family.weight_decay == "coupled" else f", decay {family.weight_decay}")
        panel.set_title(title, fontsize=11, fontweight="bold", loc="left")
        panel.set_xlabel("learning rate at the base width", fontsize=9)
        panel.set_ylabel("held-out loss (nats per token)", fontsize=9)
        panel.grid(color="#eeeeee", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels.flat[len(families) :]:
        panel.set_visible(False)
    return figure
