"""The figures of the scaling law: losses with the law through them, and what the law says of a budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpmjax.tunnel.figures import panels
from cpmjax.tunnel.scaling_law_report import Findings, budgets

_BEYOND = 2.0  # the contours go so far beyond what was trained, as a factor
_BAND = "#f59e0b"


def fits(found: Findings) -> Any:
    """Held-out loss over data, a curve for each size; over size, one for each amount of data; and what the law leaves.

    Dots are means over the seeds, bars span them, lines are the law fitted to all.
    """
    grid, law = found.grid, found.law
    figure, ((over_data, over_size, left),) = panels(1, 3, 4.6, 3.9)
    D = np.geomspace(grid.D_E[0], grid.D_E[-1], 100)
    N = np.geomspace(grid.N_S[0], grid.N_S[-1], 100)
    with np.errstate(invalid="ignore"):
        low_SE, high_SE = (grid.mean_SE - grid.losses_SER.min(axis=-1), grid.losses_SER.max(axis=-1) - grid.mean_SE)
    for s, color in enumerate(_shades(len(grid.sizes))):
        bars = {"yerr": (low_SE[s], high_SE[s]), "color": color, "markersize": 4, "elinewidth": 1}
        over_data.errorbar(grid.D_E, grid.mean_SE[s], fmt="o", label=f"{grid.axis} {grid.sizes[s]}", **bars)
        over_data.plot(D, law.loss(grid.N_S[s], D), color=color, linewidth=1.3)
        residuals = grid.mean_SE[s] - law.loss(grid.N_S[s], grid.D_E)
        # A little apart, so that their bars can be told from each other.
        left.errorbar(grid.D_E * 1.03 ** (s - len(grid.sizes) / 2), residuals, fmt="o-", linewidth=0.6, **bars)
    for e, color in enumerate(_shades(len(grid.D_E))):
        over_size.errorbar(
            grid.N_S,
            grid.mean_SE[:, e],
            (low_SE[:, e], high_SE[:, e]),
            fmt="o",
            color=color,
            markersize=4,
            elinewidth=1,
            label=f"D {_short(grid.D_E[e])}",
        )
        over_size.plot(N, law.loss(N, grid.D_E[e]), color=color, linewidth=1.3)
    left.axhline(0, color="#555555", linewidth=0.8)
    _finish(over_data, "D: tokens at the end of the decay", "held-out loss (nats per token)", "over data")
    _finish(over_size, "N: parameters without the embedding", "held-out loss (nats per token)", "over size")
    _finish(left, "D", "measured less the law (nats per token)", "what the law leaves")
    for panel, at in ((over_data, grid.D_E), (over_size, grid.N_S), (left, grid.D_E)):
        _ticks(panel.xaxis, at)
    over_data.legend(fontsize=8, frameon=False)
    over_size.legend(fontsize=8, frameon=False)
    return figure


def contours(found: Findings) -> Any:
    """The law over size and data with its best pairs for a budget, and over size at equal budgets.

    The orange band holds 95 of 100 best pairs of laws fitted to drawings of trunks; dots are what was trained.
    """
    from matplotlib import colormaps

    grid, law = found.grid, found.law
    figure, ((plane, slices),) = panels(1, 2, 5.6, 4.4)
    N = np.geomspace(grid.N_S[0] / _BEYOND, grid.N_S[-1] * _BEYOND, 120)
    D = np.geomspace(grid.D_E[0] / _BEYOND, grid.D_E[-1] * _BEYOND, 120)
    losses = law.loss(N, D[:, None])
    lines = plane.contour(N, D, losses, levels=14, cmap="viridis_r", linewidths=1.1)
    plane.clabel(lines, fontsize=7, fmt="%.2f")
    computes = 6 * np.geomspace(N[0] * D[0], N[-1] * D[-1], 60)
    best = np.array([law.optimum(compute) for compute in computes])
    drawn = np.array([[each.optimum(compute)[0] for compute in computes] for each in found.drawings["trunks"]])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    # A budget's best pairs lie on its own line N D = C / 6, so the band is bounded by two curves of such pairs.
    edge_N = np.concatenate([low, high[::-1]])
    edge_D = np.concatenate([computes / 6 / low, (computes / 6 / high)[::-1]])
    plane.fill(edge_N, edge_D, color=_BAND, alpha=0.2, linewidth=0)
    plane.plot(*best.T, color=_BAND, linewidth=2, label="least loss for its compute")
    at_N, at_D = np.meshgrid(grid.N_S, grid.D_E)
    plane.plot(at_N.ravel(), at_D.ravel(), "o", color="#374151", markersize=3, label="trained")
    equal = [compute for compute in budgets(grid) if 6 * N[0] * D[0] < compute < 6 * N[-1] * D[-1]]
    for compute, color in zip(equal, colormaps["plasma"](np.linspace(0.1, 0.75, len(equal))), strict=True):
        plane.plot(N, compute / 6 / N, "--", color=color, linewidth=1)
        slices.plot(N, law.loss(N, compute / 6 / N), color=color, linewidth=1.5, label=f"C = {compute:.0e}")
        least = law.optimum(compute)
        if N[0] < least[0] < N[-1]:
            slices.plot(least[0], law.loss(*least), "*", color=color, markersize=12, markeredgecolor="white")
    plane.set_xlim(N[0], N[-1])
    plane.set_ylim(D[0], D[-1])
    plane.set_yscale("log")
    _finish(plane, "N: parameters without the embedding", "D: tokens", "the law, nats per token")
    _ticks(plane.xaxis, grid.N_S)
    _ticks(plane.yaxis, grid.D_E)
    plane.legend(fontsize=8, loc="lower left")
    top = law.loss(grid.N_S, grid.D_E[0]).max()
    slices.set_ylim(losses.min() - 0.05, top)
    _finish(slices, "N: parameters without the embedding", "loss of the law (nats per token)", "at equal compute")
    _ticks(slices.xaxis, grid.N_S)
    slices.legend(fontsize=8, frameon=False)
    return figure


def _shades(number: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0.05, 0.85, number))


def _finish(panel: Any, x: str, y: str, title: str) -> None:
    panel.set_xscale("log")
    panel.set_title(title, fontsize=11, fontweight="bold", loc="left")
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _ticks(axis: Any, at: np.ndarray) -> None:
    axis.set_ticks(at, map(_short, at), rotation=45)
    axis.set_ticks([], minor=True)


def _short(number: float) -> str:
    return next(
        (f"{number / unit:.3g}{name}" for unit, name in ((1e9, "B"), (1e6, "M")) if number >= unit),
        f"{number / 1e3:.3g}k",
    )
