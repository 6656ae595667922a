"""`study coordinate-check`: does any activation grow or shrink with the size of the model?"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.table import write_csv
from cpmjax.studies.common import FAMILY, add_seeds_and_parametrisations, conclude, make_axes, run
from cpmjax.tunnel import coordinate_check, figures
from cpmjax.tunnel.coordinate_figures import coordinates
from cpmjax.tunnel.faults import FAULTS


def add_to(studies: Any) -> None:
    parser = studies.add_parser(
        "coordinate-check", help="does any activation grow or shrink with the size of the model?"
    )
    parser.add_argument(
        "--widths",
        type=flags.whole_numbers,
        default=[64, 128, 256, 512],
        help="a slope over less than 8 times the width is mostly noise (default: 64,128,256,512)",
    )
    parser.add_argument(
        "--layers", type=flags.whole_numbers, default=[2, 4, 8, 16], help="empty: widths only (default: 2,4,8,16)"
    )
    parser.add_argument("--controls", action="store_true", help="plant faults as well: each must be caught")
    add_seeds_and_parametrisations(parser, ["minicpm"])
    parser.set_defaults(study=study, experiment=FAMILY, home="runs/coordinate-check")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """Does any activation grow or shrink with the size of the model?"""
    axes = make_axes(width=arguments.widths, layers=arguments.layers)
    controls = [name for name in FAULTS if arguments.controls and name not in arguments.parametrisations]
    names = [*arguments.parametrisations, *controls]
    trials = run(config, coordinate_check.make_trials(config, axes, names, arguments.seeds), coordinate_check.measure)
    rows, directory = trials.rows(), trials.directory
    slopes = coordinate_check.slopes(rows)
    write_csv(directory / "slopes.csv", map(asdict, slopes))
    for name in names:
        for axis in axes:
            if any((slope.parametrisation, slope.axis) == (name, axis.name) for slope in slopes):
                print(coordinate_check.describe(slopes, name, axis.name), end="\n\n")
    for axis in axes:
        figures.save(coordinates(rows, slopes, axis.name), directory / f"{axis.name}.png")
    found = [
        verdict
        for name in arguments.parametrisations
        for verdict in coordinate_check.verdicts(slopes, name, [axis.name for axis in axes])
    ]
    found += [coordinate_check.control_verdict(slopes, name) for name in controls]
    return conclude("coordinate-check", config, trials, arguments, found)
