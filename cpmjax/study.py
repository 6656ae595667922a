"""Wind-tunnel studies: decide at small scale what will hold at large scale.

usage: python -m cpmjax.study STUDY [EXPERIMENT.yaml] [--flag=value ...] [--section.key=value ...]

A study trains many small models that differ in a few things only. Its trials, a table of them and its figures go to
runs/STUDY, or to --run.directory; the same command goes on after a kill, and does nothing twice. The exit code is 0 if
all that the study asks holds, 1 if not. `series` trains what the notebooks look into; `atlas RUN` and
`barriers RUN` look themselves into a run, of any size.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpmjax.analysis import long_studies
from cpmjax.model.presets import PRESETS
from cpmjax.parallel.machine import machine
from cpmjax.run import cli, flags
from cpmjax.run.config import Config
from cpmjax.run.directory import now, only_writer, versions, write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.optimizers import WeightDecayMode
from cpmjax.run.table import Row, aligned, write_csv
from cpmjax.tunnel import coordinate_check, figures, study_runs, transfer
from cpmjax.tunnel.faults import FAULTS, table_of
from cpmjax.tunnel.sizes import Axis, make_axis
from cpmjax.tunnel.trials import Trial, Trials
from cpmjax.tunnel.verdicts import Verdict, describe
from cpmjax.tunnel.workbench import Workbench

_EXPERIMENTS = Path(__file__).parents[1] / "experiments"
_FAMILY, _SERIES = _EXPERIMENTS / "tunnel" / "family.yaml", _EXPERIMENTS / "study.yaml"


def main(argv: list[str]) -> int:
    arguments, config = parse(argv)
    return arguments.study(arguments) if config is None else arguments.study(arguments, config)


def study_coordinate_check(arguments: argparse.Namespace, config: Config) -> int:
    """Does any activation grow or shrink with the size of the model?"""
    axes = _axes(width=arguments.widths, layers=arguments.layers)
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
        figures.save(figures.coordinates(rows, slopes, axis.name), directory / f"{axis.name}.png")
    found = [
        verdict
        for name in arguments.parametrisations
        for verdict in coordinate_check.verdicts(slopes, name, [axis.name for axis in axes])
    ]
    found += [coordinate_check.control_verdict(slopes, name) for name in controls]
    return conclude("coordinate-check", config, trials, arguments, found)


def study_transfer(arguments: argparse.Namespace, config: Config) -> int:
    """Does the best learning rate of a small model stay the best one as the model grows?"""
    if arguments.widths is None:
        arguments.widths = [] if arguments.layers or arguments.sizes else _TRANSFER_WIDTHS
    axes = _axes(width=arguments.widths, layers=arguments.layers, preset=arguments.sizes)
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
    figures.save(figures.transfer(families), trials.directory / "transfer.png")
    found = [verdict for family in families for verdict in transfer.verdicts(family)]
    return conclude("transfer", config, trials, arguments, found)


def study_series(arguments: argparse.Namespace, config: Config) -> int:
    """Trains the runs that the notebooks study, one after the other, each by a training job of its own."""
    members = study_runs.members(config, arguments.cosine_peak)
    root = Path(config.run.directory)
    if (root / "config.yaml").exists():
        raise UserError(f"{root} is a run; expected a directory of its own for a series")
    with only_writer(root, "series"):
        for number, (name, member) in enumerate(members.items(), 1):
            _say(f"run {number}/{len(members)}: {name}")
            experiment = root / f"{name}.yaml"
            write_atomically(experiment, cli.dump(member))
            code = _train(experiment)
            if code:
                _say(f"{name} ended with code {code}; the same command goes on from there")
                return code
        rows = study_runs.results(config, list(members))
        write_csv(root / "series.csv", rows)
    print(aligned([list(rows[0]), *([_shown(row.get(key)) for key in rows[0]] for row in rows)]))
    return 0


def _train(experiment: Path) -> int:
    """The exit code of a training job; a wish to stop is passed on to it, and its answer is ours."""
    with subprocess.Popen([sys.executable, "-m", "cpmjax.train", str(experiment)]) as job:
        before = signal.signal(signal.SIGTERM, lambda number, _: job.send_signal(number))
        try:
            return job.wait()
        except KeyboardInterrupt:  # the terminal has told the job as well
            return job.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _axes(**values: list[Any]) -> list[Axis]:
    """An axis for each list that is not empty. Raises UserError if all are, or for a list that is no axis."""
    axes = [make_axis(name, sizes, _FLAGS[name]) for name, sizes in values.items() if sizes]
    if not axes:
        raise UserError(f"{', '.join(_FLAGS[name] for name in values)}: expected at least one list of sizes")
    return axes


_FLAGS = {"width": "--widths", "layers": "--layers", "preset": "--sizes"}


# What every study does.


def run(config: Config, planned: Sequence[Trial], measure: Callable[[Workbench, Trial], list[Row]]) -> Trials:
    """Runs what is planned and not done yet. Raises UserError if every trial failed: then it is not the trials."""
    with Workbench(config, _say) as workbench:
        trials = Trials(config.run.directory, planned, f"{measure.__module__} {workbench.recipe}")
        with trials.lock():
            trials.run(lambda trial: measure(workbench, trial))
    failed = [outcome for outcome in trials.outcomes() if outcome["status"] == "failed"]
    if len(failed) == len(trials.outcomes()):
        raise UserError(f"{trials.table_file}: every trial failed; the first one said: {failed[0]['message']}")
    return trials


def conclude(
    study: str,
    config: Config,
    trials: Trials,
    arguments: argparse.Namespace,
    found: list[Verdict],
) -> int:
    """Writes study.json, says where everything is and, in the last line, what was found: 0 if all holds, else 1."""
    outcomes, directory = trials.outcomes(), trials.directory
    failed = sum(outcome["status"] == "failed" for outcome in outcomes)
    if failed:
        found = [*found, Verdict(study, "every trial ran", f"{failed} of {len(outcomes)} failed", "0", False)]
    asked = {key: value for key, value in vars(arguments).items() if key != "study"}
    report: dict[str, Any] = {
        "study": study,
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        "fingerprint": fingerprint(config),
        "arguments": asked,
        "verdicts": [asdict(verdict) for verdict in found],
    }
    write_atomically(directory / "study.json", json.dumps(report, indent=2) + "\n")
    for status in ("diverged", "failed"):
        messages = [outcome["message"] for outcome in outcomes if outcome["status"] == status]
        if messages:
            print(f"{len(messages)} of {len(outcomes)} trials {status}; the first one: {messages[0]}")
    print(f"table {trials.table_file}, figures {directory}/*.png, verdicts {directory / 'study.json'}\n")
    print(describe(found))
    return 0 if all(verdict.passed for verdict in found) else 1


# The command line.


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config | None]:
    """The flags of the study, and the experiment with the keys that were set; None if the study is of a run that is
    there. Raises UserError, one line."""
    parser = cli.Parser(
        prog="python -m cpmjax.study",
        description=(__doc__ or "").partition("usage:")[0],
        epilog="Keys of the experiment (--section.key=value) are those of python -m cpmjax.train --help.",
    )
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True, dest="name")
    _add_coordinate_check(studies)
    _add_transfer(studies)
    _add_series(studies)
    long_studies.add_to(studies)
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


def _add_coordinate_check(studies: Any) -> None:
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
    _add_common(parser, ["minicpm"])
    parser.set_defaults(study=study_coordinate_check, experiment=_FAMILY, home="runs/coordinate-check")


def _add_transfer(studies: Any) -> None:
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
    _add_common(parser, ["minicpm", "standard"])
    parser.set_defaults(study=study_transfer, experiment=_FAMILY, home="runs/transfer")


def _add_series(studies: Any) -> None:
    parser = studies.add_parser("series", help="trains a trunk, its decays and what they are compared with")
    parser.add_argument(
        "--cosine-peak",
        type=flags.positive_number,
        default=2.0,
        help="the cosine's peak, in those of the others (default: 2)",
    )
    parser.set_defaults(study=study_series, experiment=_SERIES, home="runs/study")


_TRANSFER_WIDTHS = [32, 64, 128, 256]
_RATES = [0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08]


def _add_common(parser: argparse.ArgumentParser, names: list[str]) -> None:
    parser.add_argument("--seeds", type=flags.positive, default=3, help="trials of each kind (default: 3)")
    parser.add_argument(
        "--parametrisations",
        type=_parametrisations,
        default=names,
        help=f"names from cpmjax.model.mup, or planted faults: {', '.join(FAULTS)} (default: {','.join(names)})",
    )


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


def _parametrisations(text: str) -> list[str]:
    names = list(dict.fromkeys(flags.names(text)))
    if not names:
        raise UserError("--parametrisations: expected at least one name")
    for name in names:
        table_of(name)
    return names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.main(main)
