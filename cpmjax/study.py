"""Wind-tunnel studies: decide at small scale what will hold at large scale.

usage: python -m cpmjax.study STUDY [EXPERIMENT.yaml] [--flag=value ...] [--section.key=value ...]

A study trains many small models that differ in a few things only. Its trials, a table of them and its figures go to
runs/STUDY, or to --run.directory; the same command goes on after a kill, and does nothing twice. The exit code is 0 if
all that the study asks holds, 1 if not. `series` trains what the notebooks look into; `predict DIRECTORY` reads a study
of schedules, `atlas RUN` and `barriers RUN` a run of any size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.studies import (
    atlas,
    barriers,
    batch_size,
    coordinate_check,
    predict,
    scaling_law,
    schedules,
    search,
    series,
    transfer,
)

_STUDIES = (coordinate_check, transfer, schedules, batch_size, scaling_law, search, predict, series, atlas, barriers)


def main(argv: list[str]) -> int:
    arguments, config = parse(argv)
    return arguments.study(arguments) if config is None else arguments.study(arguments, config)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config | None]:
    """The flags of the study, and the experiment with the keys that were set; None if the study is of a run that is
    there. Raises UserError, one line."""
    parser = cli.Parser(
        prog="python -m cpmjax.study",
        description=(__doc__ or "").partition("usage:")[0],
        epilog="Keys of the experiment (--section.key=value) are those of python -m cpmjax.train --help.",
    )
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True, dest="name")
    for study in _STUDIES:
        study.add_to(studies)
    arguments, rest = parser.parse_known_args(argv)
    for argument in rest:
        if argument.startswith("-") and "." not in argument.partition("=")[0]:
            hidden = ("study", "name", "experiment", "home")
            known = ", ".join(f"--{key.replace('_', '-')}" for key in vars(arguments) if key not in hidden)
            keys = "" if arguments.experiment is None else ", or --section.key=value"
            raise UserError(f"command line: unknown flag {argument}; expected one of {known}{keys}")
    if arguments.experiment is None:
        if rest:
            raise UserError(f"command line: unexpected {rest[0]}; expected one run, which says everything else itself")
        return arguments, None
    if not _names_a_file(rest):
        rest = [str(arguments.experiment), *rest]
    home = arguments.home
    for key in ("name", "experiment", "home"):
        delattr(arguments, key)
    return arguments, cli.load([f"--run.directory={home}", *rest], PRESETS, __doc__ or "")


def _names_a_file(arguments: Sequence[str]) -> bool:
    """Whether a word is there that is neither a key nor, as in `--run.seed 1`, the value of the key before it."""
    before = ["", *arguments[:-1]]
    return any(
        not word.startswith("-") and ("=" in key or not key.startswith("-"))
        for key, word in zip(before, arguments, strict=False)
    )


if __name__ == "__main__":
    cli.main(main)
