"""The figures of the batch-size law: loss over batch and tokens, and the best batch over the loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpmjax.analysis.batch_law import PAPER, falling, levels, over_seeds, tokens_to
from cpmjax.tunnel.batch_size import Found
from cpmjax.tunnel.figures import panels

_COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#4b5563")
_SHOWN = 8  # bowls in a panel


def contours(found: Found) -> Any:
    """For each size: lines of equal loss over batch and tokens, with the best batch of each level in red (above); and
    tokens over batch at some levels of the loss, the points that the parabolas go by (below)."""
    from matplotlib import colormaps

    figure, grid = panels(2, len(found.runs), 4.4, 3.6)
    for runs, minima, above, below in zip(found.runs, found.minima, *grid, strict=True):
        curves, batches_B = runs.curves(), runs.batches_B
        first, last = max(tokens_T[0] for tokens_T, _ in curves), min(tokens_T[-1] for tokens_T, _ in curves)
        tokens_T = np.geomspace(first, last, 100)
        losses_TB = np.stack(
            [np.interp(np.log(tokens_T), np.log(at_T), falling(losses_T)) for at_T, losses_T in curves], axis=1
        )
        drawn = above.contourf(batches_B, tokens_T, losses_TB, 20, cmap="viridis_r", alpha=0.75)
        above.contour(batches_B, tokens_T, losses_TB, drawn.levels, colors="white", linewidths=0.5)
        figure.colorbar(drawn, ax=above, label="held-out loss")
        inside = [minimum for minimum in minima if minimum]
        above.plot([m.batch for m in inside], [m.tokens for m in inside], "o-", color="#dc2626", markersize=3.5, lw=1.2)
        above.set_title(runs.name, fontsize=11, fontweight="bold", loc="left")
        heights = levels(curves)
        shown = range(0, len(heights), max(1, -(-len(heights) // _SHOWN)))
        for color, index in zip(colormaps["viridis"](np.linspace(0, 0.9, len(shown))), shown, strict=True):
            reached_B = np.array([tokens_to(heights[index], *curve) for curve in curves])
            below.plot(batches_B, reached_B, "o-", color=color, markersize=3, lw=1)
            last_B = np.flatnonzero(np.isfinite(reached_B))[-1]
            below.text(batches_B[last_B] * 1.1, reached_B[last_B], f"{heights[index]:.2f}", color=color, fontsize=7)
            minimum = minima[index]
            if minimum:
                near = np.geomspace(minimum.batch / 3, minimum.batch * 3)
                bowl = minimum.tokens * np.exp(minimum.curvature / 2 * np.log(near / minimum.batch) ** 2)
                below.plot(near, bowl, ":", color=color, lw=1.2)
                below.plot(minimum.batch, minimum.tokens, "*", color="#dc2626", markersize=9, markeredgecolor="white")
        below.set_xlim(batches_B[0] * 0.85, batches_B[-1] * 1.7)
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(batches_B, [f"{batch:,.0f}" for batch in batches_B], fontsize=8)
            doublings = first * 2.0 ** np.arange(int(np.log2(last / first)) + 1)
            panel.set_yticks(doublings, [f"{tokens:,.0f}" for tokens in doublings], fontsize=8)
            panel.minorticks_off()
            panel.set_xlabel("batch (tokens)", fontsize=9)
            panel.set_ylabel("tokens" if panel is above else "tokens to a loss", fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
    return figure


def law(found: Found) -> Any:
    """Best batch and noise scale over the loss, with their fits and the 95 % band over seeds of the first; the paper's
    line belongs to another unit of loss."""
    figure, ((panel,),) = panels(1, 1, 9.5, 4.6)
    everything = []
    for runs, minima, color in zip(found.runs, found.minima, _COLORS * len(found.runs), strict=False):
        inside = [minimum for minimum in minima if minimum]
        panel.plot(
            [m.loss for m in inside],
            [m.batch for m in inside],
            "o",
            color=color,
            ms=5,
            label=f"best batch, {runs.name}",
        )
        for _, loss, noise in runs.noise():
            low, high = noise.interval
            if np.isfinite(noise.batch):
                reach = [[noise.batch - low], [min(high, 10 * noise.batch) - noise.batch]]
                panel.errorbar(loss, noise.batch, reach, fmt="x", color=color, ms=5, lw=0.6, alpha=0.6)
        everything += [m.loss for m in inside] + [loss for _, loss, _ in runs.noise()]
    panel.plot([], [], "x", color="#6b7280", label="noise scale of the gradient, with 95 %")
    line = np.geomspace(min(everything, default=1.0), max(everything, default=2.0), 50)
    band = over_seeds(lambda seeds: np.log(found.law(seeds).batch(line)), found.seeds)
    if np.isfinite(band.low).all():
        panel.fill_between(line, np.exp(band.low), np.exp(band.high), color="black", alpha=0.1, lw=0)
    for each, style, name in (
        (found.law(), "-", "best batch"),
        (found.noise(), ":", "noise scale"),
        (PAPER, "--", "paper"),
    ):
        panel.plot(line, each.batch(line), style, color="black", lw=1.3, label=f"{name}: {each.A:.3g} / L^{each.p:.2f}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.invert_xaxis()
    ticks = np.unique(np.round(line[::10], 1))
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("held-out loss (nats per token; the paper's: of C4, another vocabulary)", fontsize=9)
    panel.set_ylabel("tokens", fontsize=9)
    panel.grid(color="#eeeeee", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure
