"""`study batch-size`: with which batch does a loss cost the fewest tokens, and does that batch grow as it falls?"""

from __future__ import annotations

import argparse
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.studies.common import EXPERIMENTS, conclude, make_axes, run
from cpmjax.tunnel import batch_size, figures
from cpmjax.tunnel.batch_size_figures import contours, law

_WIDTHS = [32, 64]
_BATCHES = [1, 2, 4, 8, 16, 32]


def add_to(studies: Any) -> None:
    parser = studies.add_parser("batch-size", help="which batch costs the fewest tokens, as the loss falls?")
    parser.add_argument("--widths", type=flags.whole_numbers, help="(default: 32,64, unless sizes are given)")
    parser.add_argument(
        "--sizes", type=flags.names, default=[], help="presets, as in tunnel-9m,tunnel-30m,tunnel-0.17b"
    )
    parser.add_argument("--batches", type=_batches, default=_BATCHES, help="in rows (default: 1,2,4,8,16,32)")
    parser.add_argument(
        "--rate-power",
        type=_power,
        default=0.0,
        help="the rate grows as batch^power from the experiment's own (default: 0, one rate for all, as in the paper)",
    )
    parser.add_argument("--seeds", type=flags.positive, default=3, help="trials of each kind (default: 3)")
    parser.set_defaults(study=study, experiment=EXPERIMENTS / "tunnel" / "batch_size.yaml", home="runs/batch-size")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """With which batch does a loss cost the fewest tokens, and does that batch grow as it falls?"""
    if arguments.widths is None:
        arguments.widths = [] if arguments.sizes else _WIDTHS
    axes = make_axes(width=arguments.widths, preset=arguments.sizes)
    if len(axes) > 1:
        raise UserError("--widths, --sizes: expected one of them")
    planned = batch_size.make_trials(config, axes[0], arguments.batches, arguments.rate_power, arguments.seeds)
    trials = run(config, planned, batch_size.measure)
    found = batch_size.Found(batch_size.sizes(trials.rows()))
    print(batch_size.describe(found), end="\n\n")
    figures.save(contours(found), trials.directory / "contours.png")
    figures.save(law(found), trials.directory / "law.png")
    return conclude("batch-size", config, trials, arguments, batch_size.verdicts(found))


def _batches(text: str) -> list[int]:
    batches = flags.whole_numbers(text)
    if len(set(batches)) < max(3, len(batches)) or min(batches) < 1:
        raise UserError(
            f"--batches = {text}: expected at least three positive numbers of rows, each once: an optimum lies between "
            "two others"
        )
    return sorted(batches)


def _power(text: str) -> float:
    try:
        power = float(text)
    except ValueError:
        power = -1.0
    if not 0 <= power <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return power
