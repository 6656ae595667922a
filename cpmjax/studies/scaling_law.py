"""`study scaling-law`: how does the loss fall with size and data, and what is the best of both for a budget?"""

from __future__ import annotations

import argparse
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.table import write_csv
from cpmjax.studies.common import EXPERIMENTS, conclude, make_axes, run
from cpmjax.tunnel import figures, scaling_law, scaling_law_report
from cpmjax.tunnel.scaling_law_figures import contours, fits
from cpmjax.tunnel.sizes import Axis

_WIDTHS = [32, 48, 64, 96, 128]
_ENDS = [0.16, 0.23, 0.34, 0.48, 0.69, 1.0]


def add_to(studies: Any) -> None:
    parser = studies.add_parser("scaling-law", help="how does the loss fall with size and data, and what is best?")
    parser.add_argument(
        "--widths", type=flags.whole_numbers, default=[], help="(default: 32,48,64,96,128, unless sizes are given)"
    )
    parser.add_argument("--sizes", type=flags.names, default=[], help="presets, as in tunnel-9m,tunnel-30m,tunnel-70m")
    parser.add_argument(
        "--ends",
        type=_ends,
        default=_ENDS,
        help=f"where branches end, as shares of the schedule (default: {','.join(map(str, _ENDS))})",
    )
    parser.add_argument("--seeds", type=flags.positive, default=2, help="trunks of each size (default: 2)")
    parser.set_defaults(study=study, experiment=EXPERIMENTS / "tunnel" / "scaling_law.yaml", home="runs/scaling-law")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """How does the loss fall with size and data, and what is the best of both for a budget?"""
    planned = scaling_law.make_trials(config, _axis(arguments), arguments.ends, arguments.seeds)
    trials = run(config, planned, scaling_law.measure)
    found = scaling_law_report.find(scaling_law.grid(trials.rows()))
    write_csv(trials.directory / "laws.csv", found.table())
    figures.save(fits(found), trials.directory / "fits.png")
    figures.save(contours(found), trials.directory / "contours.png")
    print(scaling_law_report.describe(found), end="\n\n")
    return conclude("scaling-law", config, trials, arguments, scaling_law_report.verdicts(found))


def _axis(arguments: argparse.Namespace) -> Axis:
    """The one that was asked for. Raises UserError for both, or for fewer than three sizes."""
    if arguments.widths and arguments.sizes:
        raise UserError("--widths and --sizes: expected one of them")
    if not arguments.sizes:
        arguments.widths = arguments.widths or _WIDTHS
    (axis,) = make_axes(width=arguments.widths, preset=arguments.sizes)
    if len(axis.values) < 3:
        given = f"{'--sizes' if arguments.sizes else '--widths'} = {','.join(map(str, axis.values))}"
        raise UserError(f"{given}: expected at least three, the largest is predicted from the rest")
    return axis


def _ends(text: str) -> list[float]:
    try:
        ends = sorted(float(end) for end in flags.names(text))
    except ValueError as error:
        raise UserError(f"--ends = {text}: expected numbers with commas between them") from error
    for end in ends:
        if not 0 < end <= 1:
            raise UserError(f"--ends = {text}: expected shares of the schedule, more than 0 and at most 1, got {end:g}")
    if len(set(ends)) < max(3, len(ends)):
        raise UserError(f"--ends = {text}: expected at least three, each once: the longest is predicted from the rest")
    return ends
