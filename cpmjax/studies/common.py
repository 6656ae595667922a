"""What every study that trains does: run what is planned, write down what was found; and flags that several have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpmjax.parallel.machine import machine
from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.directory import now, versions, write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.table import Row
from cpmjax.tunnel.faults import FAULTS, table_of
from cpmjax.tunnel.sizes import Axis, make_axis
from cpmjax.tunnel.trials import Trial, Trials
from cpmjax.tunnel.verdicts import Verdict, describe
from cpmjax.tunnel.workbench import Workbench

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FAMILY = EXPERIMENTS / "tunnel" / "family.yaml"


def run(config: Config, planned: Sequence[Trial], measure: Callable[[Workbench, Trial], list[Row]]) -> Trials:
    """Runs what is planned and not done yet. Raises UserError if every trial failed: then it is not the trials."""
    with Workbench(config, say) as workbench:
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
    """Says where everything is and what became of the trials, and reports."""
    outcomes, directory = trials.outcomes(), trials.directory
    failed = sum(outcome["status"] == "failed" for outcome in outcomes)
    if failed:
        found = [*found, Verdict(study, "every trial ran", f"{failed} of {len(outcomes)} failed", "0", False)]
    for status in ("diverged", "failed"):
        messages = [outcome["message"] for outcome in outcomes if outcome["status"] == status]
        if messages:
            print(f"{len(messages)} of {len(outcomes)} trials {status}; the first one: {messages[0]}")
    print(f"table {trials.table_file}, figures {directory}/*.png, verdicts {directory / 'study.json'}\n")
    return write_report(directory, study, arguments, found, fingerprint=fingerprint(config))


def write_report(directory: Path, study: str, arguments: argparse.Namespace, found: list[Verdict], **more: Any) -> int:
    """Writes study.json, `more` in it, and says in the last line what was found: 0 if all holds, else 1."""
    hidden = ("study", "name", "experiment")
    asked = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
        if key not in hidden
    }
    report: dict[str, Any] = {"study": study, "date": now(), "machine": machine(), "versions": versions(), **more}
    report |= {"arguments": asked, "verdicts": [asdict(verdict) for verdict in found]}
    write_atomically(directory / "study.json", json.dumps(report, indent=2) + "\n")
    print(describe(found))
    return 0 if all(verdict.passed for verdict in found) else 1


def say(text: str) -> None:
    """To the person who waits; standard output is for what was found."""
    print(text, file=sys.stderr, flush=True)


# Flags.


_FLAGS = {"width": "--widths", "layers": "--layers", "preset": "--sizes"}


def make_axes(**values: list[Any]) -> list[Axis]:
    """An axis for each list that is not empty. Raises UserError if all are, or for a list that is no axis."""
    axes = [make_axis(name, sizes, _FLAGS[name]) for name, sizes in values.items() if sizes]
    if not axes:
        raise UserError(f"{', '.join(_FLAGS[name] for name in values)}: expected at least one list of sizes")
    return axes


def add_seeds_and_parametrisations(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """`--seeds`, and `--parametrisations` with these as the default."""
    parser.add_argument("--seeds", type=flags.positive, default=3, help="trials of each kind (default: 3)")
    parser.add_argument(
        "--parametrisations",
        type=_parametrisations,
        default=names,
        help=f"names from cpmjax.model.mup, or planted faults: {', '.join(FAULTS)} (default: {','.join(names)})",
    )


def _parametrisations(text: str) -> list[str]:
    names = list(dict.fromkeys(flags.names(text)))
    if not names:
        raise UserError("--parametrisations: expected at least one name")
    for name in names:
        table_of(name)
    return names
