"""`study transfer`: does the best learning rate of a small model stay the best one as the model grows?"""

from __future__ import annotations

import argparse
import typing
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import WeightDecayMode
from cpmjax.studies.common import FAMILY, add_seeds_and_parametrisations, conclude, make_axes, run
from cpmjax.tunnel import figures, transfer
from cpmjax.tunnel.transfer_figures import curves

_WIDTHS = [32, 64, 128, 256]
_RATES = [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]


def add_to(studies: Any) -> None:
    parser = studies.add_parser("transfer", help="does the best learning rate stay the best one as the model grows?")
    parser.add_argument(
        "--widths", type=flags.whole_numbers, help="(default: 32,64,128,256, unless layers or sizes are given)"
    )
    parser.add_argument(
        "--layers", type=flags.whole_numbers, default=[], help="numbers of layers, at the experiment's width"
    )
    parser.add_argument("--sizes", type=flags.names, default=[], help="presets, as in tunnel-9m,tunnel-30m")
    parser.add_argument("--rates", type=_rates, default=_RATES, help=f"(default: {','.join(map(str, _RATES))})")
    parser.add_argument(
        "--weight-decay-modes", type=_decay_modes, default=["coupled"], help="coupled,scaled,independent"
    )
    add_seeds_and_parametrisations(parser, ["minicpm", "standard"])
    parser.set_defaults(study=study, experiment=FAMILY, home="runs/transfer")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """Does the best learning rate of a small model stay the best one as the model grows?"""
    if arguments.widths is None:
        arguments.widths = [] if arguments.layers or arguments.sizes else _WIDTHS
    axes = make_axes(width=arguments.widths, layers=arguments.layers, preset=arguments.sizes)
    trials = run(
        config,
        transfer.make_trials(
            config, axes, arguments.parametrisations, arguments.weight_decay_modes, arguments.rates, arguments.seeds
        ),
        transfer.measure,
    )
    families = transfer.families(trials.rows())
    for family in families:
        print(transfer.describe(family), end="\n\n")
    figures.save(curves(families), trials.directory / "transfer.png")
    found = [verdict for family in families for verdict in transfer.verdicts(family)]
    return conclude("transfer", config, trials, arguments, found)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in flags.names(text)]
    except ValueError as error:
        raise UserError(f"--rates = {text}: expected numbers with commas between them") from error
    for rate in rates:
        if not 0 < rate < float("inf"):
            raise UserError(f"--rates = {text}: expected positive learning rates, got {rate:g}")
    if len(set(rates)) < max(3, len(rates)):
        raise UserError(f"--rates = {text}: expected at least three, each once: an optimum lies between two others")
    return sorted(rates)


def _decay_modes(text: str) -> list[str]:
    modes, known = flags.names(text), typing.get_args(WeightDecayMode)
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes:
        raise UserError(f"--weight-decay-modes = {text}: expected some of {', '.join(known)}")
    return modes
