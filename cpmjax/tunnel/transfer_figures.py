"""The figure of the learning-rate transfer: loss over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpmjax.tunnel.figures import panels
from cpmjax.tunnel.transfer import Family

_WORST_SHOWN = 0.6  # nats above the worst optimum: what the figure still shows


def curves(families: Sequence[Family]) -> Any:
    """A panel for each family: held-out loss at the end over the learning rate, a curve for each size.

    Bands span the seeds, a star marks each size's optimum. A point that diverged, or lies far above, is left out.
    """
    from matplotlib import colormaps

    columns = min(len(families), 3)
    figure, grid = panels(math.ceil(len(families) / columns), columns, 4.6, 3.8, sharey=True)
    bests = np.array([family.final.min(axis=1) for family in families]).ravel()
    bests = bests[np.isfinite(bests)]
    highest = bests.max(initial=0.0) + _WORST_SHOWN
    for panel, family in zip(grid.flat, families, strict=False):
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
    for panel in grid.flat[len(families) :]:
        panel.set_visible(False)
    return figure
