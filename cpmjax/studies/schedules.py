"""`study schedules`: is warmup-stable-decay as good as a cosine, and what does the reuse of its trunk save?"""

from __future__ import annotations

import argparse
from typing import Any

from cpmjax.run import flags
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.studies.common import EXPERIMENTS, conclude, run
from cpmjax.tunnel import figures, schedules, schedules_figures, schedules_report
from cpmjax.tunnel.schedules_measure import measure

_PEAKS = [0.25, 0.5, 1.0, 2.0]


def add_to(studies: Any) -> None:
    parser = studies.add_parser("schedules", help="WSD, cosine and others from as few trunks as possible")
    parser.add_argument(
        "--peaks",
        type=_peaks,
        default=_PEAKS,
        help="multiples of the experiment's learning rate, 1 among them, at which the constant rate and WSD 10 %% are "
        f"tried, and at twice those the cosine (default: {','.join(map(str, _PEAKS))})",
    )
    parser.add_argument("--seeds", type=flags.positive, default=3, help="runs of each kind (default: 3)")
    experiment = EXPERIMENTS / "tunnel" / "schedules.yaml"
    parser.set_defaults(study=study, experiment=experiment, home="runs/schedules")


def study(arguments: argparse.Namespace, config: Config) -> int:
    """Is warmup-stable-decay as good as a cosine, and what does the reuse of its trunk save?"""
    config = schedules.in_steps(config)
    peaks = [multiple * config.optimizer.learning_rate for multiple in arguments.peaks]
    planned = schedules.make_trials(config, peaks, arguments.seeds)
    found = schedules_report.compare(run(config, planned, measure).rows())
    # Cosines of other periods are compared with the one that ends at S at the peak that is best for that one.
    planned += schedules.make_period_trials(config, found.best("cosine").peak, arguments.seeds)
    trials = run(config, planned, measure)
    plan = schedules.plan_of(planned)
    schedules.save_plan(trials.directory, plan)
    found = schedules_report.compare(trials.rows())
    print(schedules_report.describe(found), end="\n\n")
    figures.save(schedules_figures.periods(found, plan), trials.directory / "fig4.png")
    figures.save(schedules_figures.branches(found, plan), trials.directory / "fig5.png")
    figures.save(schedules_figures.ends(found), trials.directory / "ends.png")
    return conclude("schedules", config, trials, arguments, schedules_report.verdicts(found))


def _peaks(text: str) -> list[float]:
    peaks = [flags.positive_number(peak) for peak in flags.names(text)]
    if 1 not in peaks or len(set(peaks)) < max(3, len(peaks)):
        raise UserError(f"--peaks = {text}: expected at least three, each once, 1 among them")
    return sorted(peaks)
