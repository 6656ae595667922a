"""Figures of `predict`: losses that no law had seen beside what was foretold, and how far off every run's end was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpmjax.run.table import Row
from cpmjax.tunnel.figures import panels
from cpmjax.tunnel.predict import METHODS
from cpmjax.tunnel.predict_report import ERROR_BAR, errors

_COLORS = dict(zip(METHODS, ("#9ca3af", "#111827", "#2563eb", "#dc2626", "#059669"), strict=True))
_MARKERS = dict(zip(METHODS, "xsov^", strict=True))


def decays(rows: Sequence[Row]) -> Any:
    """A panel for each run of `predict.losses`, of the first seed: the losses of its decay, and each law's."""
    seed = min(row["seed"] for row in rows)
    rows = [row for row in rows if row["seed"] == seed]
    runs = [*dict.fromkeys(row["run"] for row in rows)]
    columns = min(len(runs), 5)
    figure, axes = panels(math.ceil(len(runs) / columns), columns, 2.5, 2.1, sharey=True)
    for panel, run in zip(axes.flat, runs, strict=False):
        mine = [row for row in rows if row["run"] == run]
        for law in dict.fromkeys(row["law"] for row in mine):
            points = [(row["step"], row["predicted"]) for row in mine if row["law"] == law]
            panel.plot(*zip(*points, strict=True), ".-", color=_COLORS[law], markersize=3, linewidth=1.2, label=law)
        measured = {row["step"]: row["measured"] for row in mine}
        panel.plot(measured.keys(), measured.values(), "o", color="k", markersize=3, label="measured, not seen")
        panel.set_title(run, fontsize=9)
        _plain(panel)
    for panel in axes.flat[len(runs) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out nats", fontsize=8)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=8
    )
    return figure


def ends(rows: Sequence[Row]) -> Any:
    """A panel for each fit set: foretold - measured at the end of each run, the mean over seeds and their range."""
    sets = [*dict.fromkeys(row["fit_set"] for row in rows)]
    runs = [*dict.fromkeys(row["run"] for row in rows)]
    figure, axes = panels(1, len(sets), 3.0, 0.27 * len(runs) + 1.0, sharey=True)
    at = errors(rows)
    widest = max(abs(row["error"]) for row in rows if row["law"] != METHODS[0])
    for panel, fit_set in zip(axes[0], sets, strict=True):
        panel.axvspan(-ERROR_BAR, ERROR_BAR, color="#f3f4f6")
        panel.axvline(0, color="#9ca3af", linewidth=0.8)
        for number, method in enumerate(METHODS):
            places = [place for place, run in enumerate(runs) if (fit_set, method, run) in at]
            if not places:
                continue
            values = [[*at[fit_set, method, runs[place]].values()] for place in places]
            means = np.array([np.mean(each) for each in values])
            sides = [means - [min(each) for each in values], [max(each) for each in values] - means]
            heights = np.array(places) + 0.14 * (number - 2)
            panel.errorbar(
                means,
                heights,
                xerr=sides,
                fmt=_MARKERS[method],
                color=_COLORS[method],
                markersize=4,
                elinewidth=0.8,
                label=method,
            )
        panel.set_xlim(-1.1 * widest, 1.1 * widest)
        panel.set_title(f"fitted on {fit_set}", fontsize=9)
        panel.set_xlabel("foretold - measured (nats)", fontsize=8)
        _plain(panel)
    axes[0][0].set_yticks(range(len(runs)), runs)
    axes[0][0].invert_yaxis()
    figure.legend(
        *axes[0][-1].get_legend_handles_labels(), loc="outside upper right", ncols=5, frameon=False, fontsize=8
    )
    return figure


def _plain(panel: Any) -> None:
    panel.tick_params(labelsize=7)
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
