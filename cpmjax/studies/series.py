"""`study series`: trains what the notebooks study."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpmjax.run import cli, flags
from cpmjax.run.config import Config
from cpmjax.run.directory import only_writer, write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.table import aligned, write_csv
from cpmjax.studies.common import EXPERIMENTS, say
from cpmjax.tunnel import study_runs


def add_to(studies: Any) -> None:
    parser = studies.add_parser("series", help="trains a trunk, its decays and what they are compared with")
    parser.add_argument(
        "--cosine-peak",
        type=flags.positive_number,
        default=2.0,
        help="the cosine's peak, in those of the others (default: 2)",
    )
    parser.set_defaults(study=study, experiment=EXPERIMENTS / "study.yaml", home="runs/study")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """Trains the runs that the notebooks study, one after the other, each by a training job of its own."""
    members = study_runs.members(config, arguments.cosine_peak)
    root = Path(config.run.directory)
    if (root / "config.yaml").exists():
        raise UserError(f"{root} is a run; expected a directory of its own for a series")
    with only_writer(root, "series"):
        for number, (name, member) in enumerate(members.items(), 1):
            say(f"run {number}/{len(members)}: {name}")
            experiment = root / f"{name}.yaml"
            write_atomically(experiment, cli.dump(member))
            code = _train(experiment)
            if code:
                say(f"{name} ended with code {code}; the same command goes on from there")
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
