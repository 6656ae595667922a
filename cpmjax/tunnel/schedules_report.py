"""What a study of schedules found: losses at the end, paired over seeds; what the trunk saved; the paper's claims."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cpmjax.run.errors import UserError
from cpmjax.run.table import Row, aligned
from cpmjax.tunnel.paired import signed, t_interval
from cpmjax.tunnel.schedules import EARLY, SHAPES
from cpmjax.tunnel.schedules_measure import MERGED
from cpmjax.tunnel.verdicts import Verdict

WSD = "wsd 10%"
PERIODS = ("cosine(S/2), then its floor", "cosine(2S)")
EARLY_DECAYS = tuple(f"wsd 10% ending at {100 * share:g}%" for share in EARLY)

DROP_BAR = 0.03  # nats that a decay of a tenth must be below the constant rate
MARGIN = 0.01  # nats that count as a difference


@dataclass(frozen=True)
class Line:
    """One method at one peak. `losses_TR` are held-out losses [steps, seeds], infinite where a run diverged."""

    method: str
    peak: float
    run: str
    after: int  # the step of the trunk's state with which it began
    steps: tuple[int, ...]
    losses_TR: np.ndarray

    @property
    def end(self) -> int:
        return self.steps[-1]

    @property
    def ends_R(self) -> np.ndarray:
        return self.losses_TR[-1]

    def at(self, step: int) -> np.ndarray:
        """Of each seed the loss after this many updates, infinite where there is none."""
        return self.losses_TR[self.steps.index(step)] if step in self.steps else np.full(self.ends_R.shape, math.inf)

    @property
    def finished(self) -> bool:
        """With every seed."""
        return bool(np.isfinite(self.ends_R).all())


@dataclass(frozen=True)
class Comparison:
    """All lines of a study; the peak of those that are tried at one only is `peak`."""

    peak: float
    lines: dict[tuple[str, float], Line]

    def line(self, method: str, peak: float | None = None) -> Line:
        return self.lines[method, self.peak if peak is None else peak]

    def grid(self, method: str) -> list[Line]:
        """The lines of a method, by their peaks."""
        return sorted((line for line in self.lines.values() if line.method == method), key=lambda line: line.peak)

    def best(self, method: str) -> Line:
        """At the peak with the lowest loss at the end, mean over seeds."""
        return min(self.grid(method), key=lambda line: float(line.ends_R.mean()))

    def at_edge(self, method: str) -> bool:
        grid = self.grid(method)
        return self.best(method).peak in (grid[0].peak, grid[-1].peak)


def compare(rows: Iterable[Row]) -> Comparison:
    """From the table of the trials. Raises UserError if the trunk diverged with every seed: nothing could leave it."""
    tables: dict[tuple[str, float], dict[tuple[int, int], float]] = defaultdict(dict)
    facts: dict[tuple[str, float], tuple[str, int]] = {}
    seeds: dict[int, None] = {}
    for row in rows:
        key = row["method"], row["learning_rate"]
        facts[key] = row["run"], row["after"]
        seeds[row["seed"]] = None
        if "step" in row and row["status"] == "finished":
            tables[key][row["step"], row["seed"]] = row["heldout_loss"]
        else:
            tables[key].setdefault((-1, row["seed"]), math.inf)
    lines = {}
    for key, table in tables.items():
        steps = tuple(sorted({step for step, _ in table if step >= 0}))
        losses_TR = np.array([[table.get((step, seed), math.inf) for seed in seeds] for step in steps or (0,)])
        lines[key] = Line(*key, *facts[key], steps or (0,), losses_TR)
    (peak,) = {peak for method, peak in lines if method == EARLY_DECAYS[0]}
    if not np.isfinite(lines["constant", peak].ends_R).any():
        raise UserError(f"optimizer.learning_rate = {peak:g}: the constant rate diverged; expected a lower peak")
    return Comparison(peak, lines)


def verdicts(found: Comparison) -> list[Verdict]:
    """The claims of the paper's section 4 that hold at any size, if they hold."""
    wsd, cosine = found.line(WSD), found.best("cosine")
    grid = ", ".join(f"{line.peak:g}" for line in found.grid("cosine"))
    inside = not found.at_edge("cosine")
    trunk = found.line("constant")
    early = [line.ends_R - trunk.at(line.end) for line in map(found.line, EARLY_DECAYS)]
    others = [cosine.ends_R - found.line(method, cosine.peak).ends_R for method in PERIODS]
    return [
        _at_most("below the constant rate at the same peak", wsd.ends_R - trunk.ends_R, -DROP_BAR),
        _at_most(
            "below the constant rate at any peak of the grid", wsd.ends_R - found.best("constant").ends_R, -DROP_BAR
        ),
        Verdict("cosine", f"its best peak lies inside {grid}", f"{cosine.peak:g}", "not the first or last", inside),
        _at_most("not above the cosine, each at its best peak", found.best(WSD).ends_R - cosine.ends_R, MARGIN),
        _at_most("below a decay of 2.5 %", wsd.ends_R - found.line("wsd 2.5%").ends_R, -MARGIN),
        _at_most(f"decays at {_percent(EARLY)} below the trunk there", _worst(early), 0.0, "all decays"),
        _at_most("not above a decay of the trunk", found.line("wsd-s").ends_R - wsd.ends_R, MARGIN, "wsd-s"),
        _at_most("T = S below T = S/2 and T = 2S", _worst(others), 0.0, "cosine(T)"),
    ]


def _at_most(criterion: str, differences_R: np.ndarray, bar: float, subject: str = WSD) -> Verdict:
    interval = t_interval(differences_R)
    return Verdict(subject, criterion, signed(interval), f"<= {bar:g} nats", bool(interval.value <= bar))


def _worst(differences: list[np.ndarray]) -> np.ndarray:
    """Those with the largest mean."""
    return max(differences, key=lambda each: float(each.mean()))


def _percent(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * share:g}" for share in shares) + " %"


# What is printed.


def describe(found: Comparison) -> str:
    """A table of all ends, then what the peaks, the trunk's reuse, the shapes and the merges come to."""
    seeds = found.line(WSD).losses_TR.shape[1]
    how = f"95 % t-intervals over {seeds} seeds, on the same rows" if seeds > 1 else "one seed: no intervals"
    parts = (ends(found), f"({how})", peaks(found), compute(found), shapes(found), merges(found))
    return "\n\n".join(parts)


def ends(found: Comparison) -> str:
    """Held-out loss at the end of every run, beside that of the decay of a tenth; steps that it took."""
    rows = [("run", "peak", "ends at", "held-out loss", "less that of wsd 10%", "steps trained")]
    total = found.line(WSD).end
    for line in sorted(found.lines.values(), key=lambda line: (line.end, float(line.ends_R.mean()))):
        compared = line.finished and line.end == total
        less = signed(t_interval(line.ends_R - found.line(WSD).ends_R)) if compared else ""
        loss = f"{line.ends_R.mean():.4f}" if line.finished else "diverged"
        rows.append((line.method, f"{line.peak:g}", str(line.end), loss, less, str(line.end - line.after)))
    return aligned(rows)


def peaks(found: Comparison) -> str:
    """The best peak of each method that has a grid of them."""
    rows = []
    for method in ("constant", WSD, "cosine"):
        losses = ", ".join(f"{line.peak:g}: {line.ends_R.mean():.4f}" for line in found.grid(method))
        edge = ", at the edge of the grid" if found.at_edge(method) else ""
        rows.append((f"  {method}", f"{found.best(method).peak:g}{edge}", f"({losses})"))
    difference = signed(t_interval(found.best(WSD).ends_R - found.best("cosine").ends_R))
    return f"best peak\n{aligned(rows)}\n  each at its best, wsd 10% less cosine: {difference}"


def family(found: Comparison) -> list[Line]:
    """The trunk and what left it, directly or through a decay: all that has its weights in common."""
    own = [line for line in found.lines.values() if line.peak == found.peak and line.method != "constant"]
    branches = [line for line in own if line.method.startswith("wsd") and line.finished]
    return [found.line("constant"), *branches]


def compute(found: Comparison) -> str:
    """Steps that were trained, beside those of the same models each from its beginning."""
    trunk, *branches = family(found)
    total = trunk.end
    trained = total + sum(line.end - line.after for line in branches)
    scratch = total + sum(line.end for line in branches)
    lengths = [line for line in branches if line.method in (*EARLY_DECAYS, WSD)]
    ours = total + sum(line.end - line.after for line in lengths)
    theirs = sum(line.end for line in lengths)
    sizes = _percent(sorted(line.end / total for line in lengths))
    return (
        f"the trunk and the {len(branches)} runs that left it took {trained} steps; each from its beginning they would "
        f"take {scratch}: reuse saves {1 - trained / scratch:.0%}\n"
        f"models of {sizes} of the length: {ours} steps with one trunk, which is left over and may go on, and {theirs} "
        f"with a cosine each: reuse saves {1 - ours / theirs:.0%}"
    )


def shapes(found: Comparison) -> str:
    """How far apart the shapes of a decay are, and how many of them differ from the experiment's beyond their noise."""
    texts = []
    for share in (share for share in SHAPES if SHAPES[share]):
        name = f"wsd {100 * share:g}%"
        own = found.line(name)
        others = [line for line in family(found) if line.method.startswith(f"{name} ") and line.end == own.end]
        means = [float(line.ends_R.mean()) for line in (own, *others)]
        differences = {line.method.removeprefix(f"{name} "): t_interval(line.ends_R - own.ends_R) for line in others}
        apart = [f"{shape} {signed(each)}" for shape, each in differences.items() if each.low > 0 or each.high < 0]
        texts.append(
            f"shapes of a decay of {100 * share:g} %: {len(means)} within {max(means) - min(means):.4f} nats; of them "
            f"apart from the experiment's beyond the interval: {', '.join(apart) or 'none'}"
        )
    return "\n".join(texts)


def merges(found: Comparison) -> str:
    """What share of the drop of a decay over the same window a merge of the trunk's weights brings."""
    constant = found.line("constant").ends_R
    texts = []
    for share in MERGED:
        drop = constant - found.line(f"wsd {100 * share:g}%").ends_R
        for kind in ("lawa", "wsm"):
            part = t_interval((constant - found.line(f"{kind} {100 * share:g}%").ends_R) / drop)
            between = "" if math.isnan(part.low) else f" ({part.low:.0%} to {part.high:.0%})"
            texts.append(f"{kind} {100 * share:g}% {part.value:.0%}{between}")
    return f"of the drop of the decay over the same window, a merge without a decay brings: {', '.join(texts)}"
