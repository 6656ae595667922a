"""What the branches of a scaling-law study say: the law, how well it predicts what it has not seen, the best N and D.

The bars were set before anything was trained. A law is used to predict a model that is not trained yet, so it is fitted
without the largest size, and without the longest branches, and asked for them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np

from cpmjax.analysis import scaling_law
from cpmjax.analysis.scaling_law import ScalingLaw, tokens_per_parameter
from cpmjax.run.table import Row, aligned
from cpmjax.tunnel.scaling_law import Grid
from cpmjax.tunnel.verdicts import Verdict

RISE_BAR = 0.01  # nats per token that more data, or a larger model, may be worse: what seeds leave in a mean of three
PREDICTION_BAR = 0.03  # nats per token: what one seed is off, and less than one size makes
EXPONENT_BAR = 0.05  # below it a term changes by 15 % over a factor of 30, and might as well be a logarithm
RESAMPLES = 200

HOFFMANN = ScalingLaw(406.4, 0.34, 410.7, 0.28, 1.69)  # 2203.15556, approach 3: nats per token of MassiveText
MINICPM = {"K2": 0.01, "eta": -0.10, "unit": 1e9}  # 2404.06395, section 4.5: means over five texts
MINICPM_BUDGET = 4e21  # at which they are its 192 tokens per parameter


@dataclass(frozen=True)
class Prediction:
    """What a fit without some points says of them."""

    left_out: str
    errors: np.ndarray  # predicted less measured (a mean over seeds), nats per token

    @property
    def mean(self) -> float:
        return float(np.abs(self.errors).mean())


@dataclass(frozen=True)
class Findings:
    grid: Grid
    law: ScalingLaw  # of all models
    drawings: dict[str, list[ScalingLaw]]  # of each bootstrap drawing, by what was drawn: trunks, models
    without: dict[str, ScalingLaw]  # of what was left, by what was left out

    def interval(self, value: Callable[[ScalingLaw], float], drawn: str = "trunks") -> tuple[float, float]:
        """Where anything that a law says lies for 95 of 100 drawings."""
        low, high = np.percentile([value(law) for law in self.drawings[drawn]], [2.5, 97.5])
        return float(low), float(high)

    @property
    def predictions(self) -> list[Prediction]:
        """Each size left out, each amount of data, and the largest of both."""
        grid, places = self.grid, _left_out(self.grid)
        return [
            Prediction(name, (law.loss(grid.N_S[:, None], grid.D_E) - grid.mean_SE)[places[name]])
            for name, law in self.without.items()
        ]

    def table(self) -> list[Row]:
        """A line for each law: what it was fitted to, and its constants in plain units."""
        laws = [("everything", self.law)]
        laws += [(f"drawn {drawn}", law) for drawn, drawings in self.drawings.items() for law in drawings]
        laws += [(f"without {left_out}", law) for left_out, law in self.without.items()]
        return [{"fitted_to": name} | asdict(law) for name, law in laws]

    @staticmethod
    def read(grid: Grid, table: Iterable[Row]) -> Findings:
        """From the two tables of a study, without a fit."""
        law: dict[str, ScalingLaw] = {}
        drawings: dict[str, list[ScalingLaw]] = {"trunks": [], "models": []}
        for row in table:
            found = ScalingLaw(**{field.name: float(row[field.name]) for field in fields(ScalingLaw)})
            if row["fitted_to"].startswith("drawn "):
                drawings[row["fitted_to"].removeprefix("drawn ")].append(found)
            else:
                law[row["fitted_to"].removeprefix("without ")] = found
        return Findings(grid, law.pop("everything"), drawings, law)


def find(grid: Grid) -> Findings:
    """Fits the law to all models, to drawings of them, and without each size and amount of data. Raises UserError if
    too few models are there."""
    N_T, D_T, losses_T, trunk_T = grid.models()
    drawings = {
        drawn: scaling_law.bootstrap(N_T, D_T, losses_T, RESAMPLES, together_T=together_T)
        for drawn, together_T in (("trunks", trunk_T), ("models", None))
    }
    place_T, left_out = (np.searchsorted(grid.N_S, N_T), np.searchsorted(grid.D_E, D_T)), _left_out(grid)
    laws = scaling_law.fits_without(N_T, D_T, losses_T, np.array([out_SE[place_T] for out_SE in left_out.values()]))
    return Findings(grid, scaling_law.fit(N_T, D_T, losses_T), drawings, dict(zip(left_out, laws, strict=True)))


def _left_out(grid: Grid) -> dict[str, np.ndarray]:
    """Booleans [S, E] for what a fit is asked of without having seen it, by its name."""
    size_SE, data_SE = np.indices(grid.mean_SE.shape)
    left_out = {f"{grid.axis} {size}": size_SE == s for s, size in enumerate(grid.sizes)}
    left_out |= {f"{tokens:,.0f} tokens": data_SE == e for e, tokens in enumerate(grid.D_E)}
    largest, longest = len(grid.sizes) - 1, len(grid.D_E) - 1
    return left_out | {"the largest and the longest": (size_SE == largest) | (data_SE == longest)}


def verdicts(found: Findings) -> list[Verdict]:
    grid, error = found.grid, {each.left_out: each.mean for each in found.predictions}
    made = [
        Verdict("losses", criterion, f"{rise:+.4f}", f"<= {RISE_BAR:g} nats", rise <= RISE_BAR)
        for criterion, rise in (
            ("more data is never worse", grid.rise_with_data),
            ("larger is never worse", grid.rise_with_size),
        )
    ]
    made += [
        Verdict(
            "prediction",
            f"{name}, left out",
            f"{error[name]:.4f}",
            f"<= {PREDICTION_BAR:g} nats",
            error[name] <= PREDICTION_BAR,
        )
        for name in (f"{grid.axis} {grid.sizes[-1]}", f"{grid.D_E[-1]:,.0f} tokens")
    ]
    for name, of in (("a", "size"), ("b", "data")):
        value = operator.attrgetter(name)
        low, high = found.interval(value)
        measured, bar = f"{value(found.law):.3f} [{low:.3f}, {high:.3f}]", f"low end > {EXPONENT_BAR:g}"
        made.append(Verdict("law", f"the exponent of {of} is determined", measured, bar, low > EXPONENT_BAR))
    return made


# Tables.


def budgets(grid: Grid) -> list[float]:
    """Powers of ten of 6 N D that the grid spans, a hundred times the last of them, and the paper's."""
    low, high = (6 * grid.N_S[end] * grid.D_E[end] for end in (0, -1))
    inside = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    return [*inside, 100 * (inside or [high])[-1], MINICPM_BUDGET]


def describe(found: Findings) -> str:
    """Losses and cost, the law, its predictions, its optimum; then what to make of them."""
    return "\n\n".join([_losses(found.grid), _law(found), _errors(found), _optimum(found), _sure(found)])


def _losses(grid: Grid) -> str:
    rows = [[grid.axis, "N", *(f"D {tokens:,.0f}" for tokens in grid.D_E), "spread of the seeds"]]
    for size, N, means, seeds in zip(grid.sizes, grid.N_S, grid.mean_SE, grid.losses_SER, strict=True):
        with np.errstate(invalid="ignore"):
            spread = np.ptp(seeds, axis=1).mean()
        rows.append([str(size), f"{N:,.0f}", *(f"{loss:.4f}" for loss in means), f"{spread:.4f}"])
    trained, scratch = grid.tokens_trained, grid.tokens_from_scratch
    return (
        f"held-out loss at the end of each decay, in nats per token\n{aligned(rows)}\n"
        f"Cost: a trunk and {len(grid.D_E)} decays are {trained:,} tokens a size and seed; a run for each point would "
        f"be {scratch:,}, {scratch / trained:.1f} times as many. The longest branch has read the text "
        f"{grid.epochs:.2f} times."
    )


def _law(found: Findings) -> str:
    values: dict[str, Callable[[ScalingLaw], float]] = {
        field.name: operator.attrgetter(field.name) for field in fields(ScalingLaw)
    }
    values |= {"K^2": lambda law: law.K**2, "eta": operator.attrgetter("eta")}
    rows = [["", "value", "95 % over trunks", "95 % over models", "N and D in billions", "95 % over trunks"]]
    for name, value in values.items():
        row = [name, f"{value(found.law):.4g}", *(_range(*found.interval(value, drawn)) for drawn in found.drawings)]
        if name in ("C_N", "C_D", "K^2"):
            low, high = found.interval(partial(_in_billions, value))
            rows.append([*row, f"{_in_billions(value, found.law):.4g}", _range(low, high)])
        else:
            rows.append([*row, "the same", ""])
    return f"L = C_N N^-a + C_D D^-b + L0; N / D = K^2 (C / 6)^eta, C = 6 N D\n{aligned(rows)}"


def _in_billions(value: Callable[[ScalingLaw], float], law: ScalingLaw) -> float:
    return value(law.in_units(1e9))


def _errors(found: Findings) -> str:
    rows = [("left out of the fit", "mean error", "largest", "bias")]
    for each in found.predictions:
        largest = np.abs(each.errors).max()
        rows.append((each.left_out, f"{each.mean:.4f}", f"{largest:.4f}", f"{each.errors.mean():+.4f}"))
    residuals_SE = found.law.loss(found.grid.N_S[:, None], found.grid.D_E) - found.grid.mean_SE
    rows.append(("nothing", f"{np.abs(residuals_SE).mean():.4f}", f"{np.abs(residuals_SE).max():.4f}", ""))
    return f"predicted less measured, nats per token\n{aligned(rows)}"


def _optimum(found: Findings) -> str:
    grid, rows = found.grid, [["C", "N", "D", "D / N", "95 % over trunks", "Chinchilla", "MiniCPM", ""]]
    for compute in budgets(grid):
        N, D = found.law.optimum(compute)
        inside = grid.N_S[0] <= N <= grid.N_S[-1] and grid.D_E[0] <= D <= grid.D_E[-1]
        interval = _range(*found.interval(partial(ratio, compute=compute)))
        published = [ratio(HOFFMANN, compute), tokens_per_parameter(**MINICPM, compute=compute)]
        row = [f"{compute:.0e}", f"{N:,.3g}", f"{D:,.3g}", f"{D / N:.3g}", interval]
        row += [f"{each:.3g}" for each in published]
        rows.append([*row, "" if inside else "beyond what was trained"])
    return f"least loss for C = 6 N D floating-point operations\n{aligned(rows)}"


def ratio(law: ScalingLaw, compute: float) -> float:
    """D / N at the optimum."""
    return tokens_per_parameter(law.K**2, law.eta, compute)


def _sure(found: Findings) -> str:
    low, high = found.interval(partial(ratio, compute=MINICPM_BUDGET))
    plain = tokens_per_parameter(MINICPM["K2"], MINICPM["eta"], MINICPM_BUDGET)
    return (
        "D / N does not depend on the unit of N and D, but K^2 does: the published K^2 = 0.01 and eta = -0.10 give 192 "
        f"at {MINICPM_BUDGET:.0e} with N and D in billions, and {plain:,.0f} if they are taken for plain numbers.\n"
        "The columns Chinchilla and MiniCPM are those laws read far below where they were fitted, and of other texts, "
        "vocabularies and losses: a direction, no comparison. N is without the embedding, a large part of a small "
        f"model.\nAt {MINICPM_BUDGET:.0e} this study itself says {_range(low, high)} tokens per parameter: that is how "
        "far its exponents carry."
    )


def _range(low: float, high: float) -> str:
    return f"[{low:.3g}, {high:.3g}]"
