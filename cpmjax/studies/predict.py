"""`study predict [DIRECTORY]`: would laws of the learning rate have foretold the decays of a study of schedules?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpmjax.analysis.decay_prediction import Curve, Law
from cpmjax.run.directory import Lines, only_writer
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv, write_csv
from cpmjax.studies.common import say, write_report
from cpmjax.tunnel import predict, predict_figures, predict_report, schedules
from cpmjax.tunnel.figures import save
from cpmjax.tunnel.predict import Fit


def add_to(studies: Any) -> None:
    parser = studies.add_parser(
        "predict", help="do laws fitted on some runs of a study of schedules foretell the others?"
    )
    parser.add_argument(
        "schedules",
        type=Path,
        nargs="?",
        default=Path("runs/schedules"),
        metavar="DIRECTORY",
        help="a study of schedules (default: runs/schedules)",
    )
    parser.add_argument(
        "--public",
        type=Path,
        metavar="FOLDER",
        help="loss_curve_repo of github.com/thu-yao-01-luo/MultiPowerLaw: score the published laws on its curves",
    )
    parser.add_argument("--directory", type=Path, help="for the results (default: DIRECTORY-predict)")
    parser.set_defaults(study=study, experiment=None)


def study(arguments: argparse.Namespace) -> int:
    """Fits each law for each seed on some of the runs, and scores it on the others."""
    source = arguments.schedules
    directory = arguments.directory or source.with_name(f"{source.name}-predict")
    public = predict_report.public_finals()
    scored = predict_report.public_scores(arguments.public) if arguments.public else []
    runs = _runs(source)
    if not runs:
        raise UserError(f"{source / 'trials.csv'}: no run came to its end; expected a study of schedules that did")
    fits = predict.make_fits(runs)
    with only_writer(directory, "study"):
        solved = _solve(fits, directory / "fits.jsonl")

    rows = [row for fit, law in solved for row in predict.scores(fit, law)]
    teacher = [*dict.fromkeys(fit.fit_set for fit in fits)][-1]
    curves = [row for fit, law in solved if fit.fit_set == teacher for row in predict.losses(fit, law)]
    write_csv(directory / "predict.csv", rows)
    write_csv(directory / "laws.csv", [row for fit, law in solved for row in predict.parameters(fit, law)])
    write_csv(directory / "curves.csv", curves)
    write_csv(directory / "public.csv", [*public, *scored])
    save(predict_figures.decays(curves), directory / "predict.png")
    save(predict_figures.ends(rows), directory / "errors.png")

    first = next(iter(runs.values()))
    known_by_set = predict.fit_sets(first)
    for name, known in known_by_set.items():
        print(f"{name}: fitted on {', '.join(known)}\n{predict_report.describe(rows, name)}\n")
    print(predict_report.remarks(solved), predict_report.describe_public(public), sep="\n\n", end="\n\n")
    found = predict_report.trunk_verdicts(solved) + predict_report.wsd_verdicts(rows, predict.judged(first))
    found += predict_report.public_verdicts(public, scored)
    print(f"tables {directory}/*.csv, figures {directory}/*.png, verdicts {directory / 'study.json'}\n")
    return write_report(directory, "predict", arguments, found, fit_sets=known_by_set)


def _runs(source: Path) -> dict[int, dict[str, Curve]]:
    """{seed: {name: curve}} of the trunk of a study of schedules, and of all that has its peak; whole seeds only."""
    found: dict[int, list[Curve]] = {}
    for run in schedules.curves(read_csv(source / "trials.csv"), schedules.load_plan(source)):
        curve = Curve(run.run, run.rates_S, run.steps_T, run.losses_T, run.warmup)
        found.setdefault(run.seed, []).append(curve)
    most = max(map(len, found.values()), default=0)
    for seed in [seed for seed, curves in found.items() if len(curves) < most]:
        say(f"seed {seed}: {len(found.pop(seed))} of {most} runs came to their end; it is left out")
    return {seed: predict.one_peak(curves) for seed, curves in found.items()}


def _solve(fits: Sequence[Fit], file: Path) -> list[tuple[Fit, Law | None]]:
    """Each fit with its law, None if its runs do not determine one; what the file has already is not solved again."""
    ledger = Lines(file)
    laws = {line["fit"]: line["law"] for line in Lines.read(file)}
    try:
        for fit in tqdm(fits, unit="fit", mininterval=0.5 if sys.stderr.isatty() else 10):
            if fit.identity not in laws:
                law = fit.solve()
                laws[fit.identity] = None if law is None else asdict(law)
                ledger.append({"fit": fit.identity, "law": laws[fit.identity]})
    finally:
        ledger.close()
    found = [(fit, laws[fit.identity]) for fit in fits]
    return [(fit, None if law is None else fit.kind(**law)) for fit, law in found]
