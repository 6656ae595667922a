"""Laws fitted on some schedules and scored on others: made-up studies whose law is known, and planted faults."""

from __future__ import annotations

import dataclasses
import json

import jobs
import numpy as np
import pytest
import tunnel_jobs
from tunnel_jobs import run_study as run

from cpmjax.analysis import public_curves
from cpmjax.analysis.convex_bound import ConvexBound
from cpmjax.analysis.decay_prediction import LAWS, Curve, predict
from cpmjax.analysis.multi_power import MultiPower
from cpmjax.analysis.tissue import Tissue
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv, write_csv
from cpmjax.studies import predict as command
from cpmjax.tunnel import predict as study
from cpmjax.tunnel import predict_report, schedules

TOTAL, WARMUP = 200, 10
PLANTED = Tissue(L0=2.5, A=1.5, alpha=0.45, C=8.0, memory=8.0)
LAW_OF = {
    Tissue: PLANTED,
    MultiPower: MultiPower(L0=2.5, A=2.0, alpha=0.4, B=30.0, C=3.0, beta=0.4, gamma=0.9),
    ConvexBound: ConvexBound(L0=2.0, D2=4.0, G2=60.0),
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    keys = ["--schedule.warmup=10", "--schedule.stable=170", "--schedule.decay=20", "--optimizer.learning_rate=0.01"]
    config = schedules.in_steps(tunnel_jobs.config(jobs.shared_folder(tmp_path_factory), *keys))
    return schedules.plan_of(schedules.make_trials(config, (0.005, 0.01, 0.02), 1))


def made_up(plan, law=PLANTED, runs=None, **shifts):
    """A curve for each run, its losses every ten updates those of a law; `shifts` add to all losses of a run."""
    found = []
    for name in runs or plan:
        rates_S = schedules.rates(plan[name])
        steps_T = np.arange(20, len(rates_S) + 1, 5)
        losses_T = predict(law, rates_S, steps_T, WARMUP) + shifts.get(name, 0.0)
        found.append(Curve(name, rates_S, steps_T, losses_T, WARMUP))
    return found


EARLY = [f"wsd 10% ending at {share}%" for share in (40, 50, 60)]


# What is fitted on what.


def test_the_runs_are_told_by_their_rates(plan):
    curves = study.one_peak(made_up(plan))
    assert next(iter(curves)) == "constant" and {"wsd 10%", "wsd-s", "cosine"} < curves.keys()
    assert not [name for name in curves if "peak" in name]
    assert curves["constant"].steps_T[0] == 25  # after the first tenth
    assert curves["wsd 20%"].steps_T[0] == 165 and curves["wsd-s"].steps_T[0] == 95  # its own losses, not the trunk's
    assert study.fit_sets(curves) == {
        study.TRUNK: ["constant"],
        study.SHORT: ["constant", "wsd 2.5%"],
        study.LONG: ["constant", "wsd 20%"],
        study.EARLY: ["constant", *EARLY],
        study.COSINE: ["constant", *EARLY, "cosine"],
    }
    assert study.judged(curves) == "wsd 10%"


def test_what_is_fitted_is_not_scored(plan):
    fits = study.make_fits({0: study.one_peak(made_up(plan)), 1: study.one_peak(made_up(plan))})
    assert len(fits) == 2 * 5 * len(LAWS)
    for fit in fits:
        known, targets = ({curve.name for curve in curves} for curves in (fit.known, fit.targets))
        assert not known & targets and fit.known[0].name == "constant"
        assert len(known | targets) == 18
    assert all("cosine" in {curve.name for curve in fit.targets} for fit in fits if fit.fit_set == study.EARLY)


def test_runs_that_are_not_there_or_not_finite(plan):
    few = study.one_peak(made_up(plan, runs=["constant", "wsd 10%"]))
    assert study.fit_sets(few) == {study.TRUNK: ["constant"], study.SHORT: ["constant", "wsd 10%"]}
    with pytest.raises(UserError, match="constant, cosine: expected a decay that ends where constant ends"):
        study.fit_sets(study.one_peak(made_up(plan, runs=["constant", "cosine"])))
    with pytest.raises(UserError, match="none is constant after its warm-up"):
        study.one_peak(made_up(plan, runs=["wsd 10%", "cosine"]))
    broken = made_up(plan, runs=["constant", "wsd 10%", "wsd 20%"], **{"wsd 20%": np.nan})
    assert study.one_peak(broken).keys() == {"constant", "wsd 10%"}


# What is scored.


def fits_of(plan, fit_set, **shifts):
    curves = study.one_peak(made_up(plan, **shifts))
    return {fit.kind: fit for fit in study.make_fits({0: curves}) if fit.fit_set == fit_set}


def test_scores_are_foretold_less_measured_and_what_needs_no_law_is_by_hand(plan):
    fit = fits_of(plan, study.EARLY, **{"wsd 20%": -0.07})[Tissue]
    rows = {(row["law"], row["run"]): row for row in study.scores(fit, PLANTED)}
    assert rows["Tissue", "wsd 10%"]["error"] == pytest.approx(0, abs=1e-9)
    assert rows["Tissue", "wsd 20%"]["error"] == pytest.approx(0.07)
    assert rows["Tissue", "wsd 20%"]["mean_abs_error_of_decay"] == pytest.approx(0.07)

    def loss(run, step):
        return predict(PLANTED, schedules.rates(plan[run]), np.array([step]), WARMUP)[0]

    drops = [loss("constant", step) - loss(run, step) for run, step in zip(EARLY, (80, 100, 120), strict=True)]
    ending, stays = loss("wsd 10%", TOTAL), loss("constant", TOTAL)
    assert rows["no decay", "wsd 10%"]["error"] == pytest.approx(stays - ending)
    assert rows["same drop", "wsd 10%"]["error"] == pytest.approx(stays - np.mean(drops) - ending)
    assert rows["no decay", "wsd 10% ending at 80%"]["measured"] == pytest.approx(loss("wsd 10% ending at 80%", 160))
    # A cosine is no branch of the trunk: only a law says something of it.
    assert ("Tissue", "cosine") in rows and ("no decay", "cosine") not in rows


def test_a_trunk_alone_leaves_nothing_but_no_decay(plan):
    fits = fits_of(plan, study.TRUNK)
    assert fits[Tissue].solve() is None and fits[MultiPower].solve() is None
    assert {row["law"] for row in study.scores(fits[Tissue], None)} == {"no decay"}
    assert study.scores(fits[MultiPower], None) == study.parameters(fits[MultiPower], None) == []
    assert {*study.undetermined(PLANTED, fits[Tissue].known[0])} == {"C", "memory"}


def test_losses_are_those_of_the_decay_and_read_back(plan, tmp_path):
    fit = fits_of(plan, study.COSINE)[Tissue]
    rows = study.losses(fit, dataclasses.replace(PLANTED, L0=2.6))
    write_csv(tmp_path / "curves.csv", rows)
    assert read_csv(tmp_path / "curves.csv") == rows
    assert [row["step"] for row in rows if row["run"] == "wsd 10%"] == [185, 190, 195, 200]
    assert all(row["predicted"] - row["measured"] == pytest.approx(0.1, abs=2e-5) for row in rows)


# How it is judged.


def rows_of(errors, run="wsd 10%", law="MultiPower", fit_set=study.COSINE):
    return [
        {"fit_set": fit_set, "seed": seed, "law": law, "run": run, "error": error} for seed, error in enumerate(errors)
    ]


@pytest.fixture(scope="module")
def solved(plan):
    fits = [fit for fit_set in (study.TRUNK, study.COSINE) for fit in fits_of(plan, fit_set).values()]
    return [(fit, None if fit.fit_set == study.TRUNK and fit.kind.annealing else LAW_OF[fit.kind]) for fit in fits]


@pytest.mark.parametrize(
    ("errors", "measured", "passed"),
    [
        ((0.02, -0.03, 0.01), "0.0200 (seeds -0.0300 to +0.0200)", True),
        ((0.05, -0.05, 0.01), "0.0367 (seeds -0.0500 to +0.0500)", False),
    ],
)
def test_the_multi_power_law_is_judged_by_each_seed_s_error(errors, measured, passed):
    (found,) = predict_report.wsd_verdicts(rows_of(errors), "wsd 10%")
    assert (found.passed, found.measured) == (passed, measured)
    # Without a cosine it is judged by what it learnt from early decays; without those, not at all.
    (early,) = predict_report.wsd_verdicts(rows_of(errors, fit_set=study.EARLY), "wsd 10%")
    assert early.criterion.endswith("fitted on trunk, early decays") and early.passed == passed
    assert predict_report.wsd_verdicts(rows_of(errors, fit_set=study.SHORT), "wsd 10%") == []


def test_a_trunk_alone_determines_no_annealing_and_a_fit_that_goes_on_fails(solved):
    found = predict_report.trunk_verdicts(solved)
    assert [(verdict.measured, verdict.passed) for verdict in found] == [
        ("C, memory", True),
        ("B, C, beta, gamma", True),
    ]
    found = predict_report.trunk_verdicts([(fit, LAW_OF[fit.kind]) for fit, _ in solved])
    assert [verdict.passed for verdict in found] == [False, False]
    assert found[0].measured == "C, memory, but the fit goes on"


def test_a_law_is_told_apart_from_no_law_by_its_interval_over_seeds():
    plain = rows_of([0.03, -0.04, 0.05], law="same drop") + rows_of([0.1, 0.1, 0.1], law="no decay")
    better, worse, like = ([0.01, 0.02, -0.03], [0.1, -0.11, 0.13], [0.02, -0.05, 0.05])
    rows = plain + rows_of(better, law="Tissue") + rows_of(worse) + rows_of(like, law="ConvexBound")
    said = predict_report.describe(rows, study.COSINE)
    last = "Tissue is better than same drop; MultiPower is worse than same drop; ConvexBound is not told apart from"
    assert said.splitlines()[-1] == f"{last} same drop."
    # |errors| are smaller by exactly 0.02 of each seed: an interval without width.
    assert "-0.020 [-0.020, -0.020]" in said
    alone = predict_report.describe([row for row in rows if row["seed"] == 0], study.COSINE)
    assert alone.splitlines()[-1].startswith("Tissue is not told apart from") and "[" not in alone
    # What no plain prediction is made of does not enter the means.
    cosine = rows_of([5.0, 5.0, 5.0], law="Tissue", run="cosine")
    assert predict_report.describe(rows + cosine, study.COSINE).splitlines()[-3:] == said.splitlines()[-3:]


def test_the_public_numbers_and_a_wrong_constant(monkeypatch):
    found = predict_report.public_verdicts(predict_report.public_finals(), [])
    assert [verdict.measured for verdict in found] == ["3.2669", "2.9360", "2.7005"]
    assert all(verdict.passed for verdict in found)
    wrong = dataclasses.replace(public_curves.FITTED[100], gamma=0.66)
    monkeypatch.setitem(public_curves.FITTED, 100, wrong)
    finals = predict_report.public_finals()
    assert [verdict.passed for verdict in predict_report.public_verdicts(finals, [])] == [True, False, True]
    errors = [
        {"size": 25, "mean_abs_error": 0.003762, "r2": 0.99881},
        {"size": 400, "mean_abs_error": 0.00485, "r2": 1},
    ]
    with_scores = predict_report.public_verdicts(finals, errors)
    assert [verdict.passed for verdict in with_scores] == [True, True, False, True, False]


# The command.


def test_a_seed_that_is_not_whole_is_left_out(plan, tmp_path):
    few = {name: plan[name] for name in ("constant", "wsd 10%", "wsd-s")}
    write_study(tmp_path / "schedules", few)
    rows = read_csv(tmp_path / "schedules" / "trials.csv")
    rows += [row | {"seed": seed} for seed in (1, 2) for row in rows if seed == 1 or row["run"] != "wsd-s"]
    write_csv(tmp_path / "schedules" / "trials.csv", rows)
    found = command._runs(tmp_path / "schedules")
    assert {seed: [*curves] for seed, curves in found.items()} == {0: [*few], 1: [*few]}


def write_study(directory, plan, **more):
    directory.mkdir()
    schedules.save_plan(directory, plan)
    rows = []
    for curve in made_up(plan, LAW_OF[MultiPower]):
        losses = list(zip(curve.steps_T.tolist(), curve.losses_T.tolist(), strict=True))
        labels = {"run": curve.name, "status": "finished"}
        rows += [labels | {"seed": 0, "step": step, "loss": 9.0, "heldout_loss": loss} for step, loss in losses]
    write_csv(directory / "trials.csv", [row | more for row in rows])


@pytest.mark.slow
def test_the_command_finds_a_planted_law_once(plan, tmp_path, monkeypatch):
    write_study(tmp_path / "schedules", {name: plan[name] for name in ("constant", "wsd 10%", "wsd-s", *EARLY)})
    code, said = run("predict", tmp_path / "schedules")
    directory = tmp_path / "schedules-predict"
    files = {"predict.csv", "laws.csv", "curves.csv", "public.csv", "predict.png", "errors.png", "study.json"}
    files |= {"fits.jsonl", ".lock"}
    assert code == 0 and {file.name for file in directory.iterdir()} == files
    assert said.splitlines()[-1] == "verdict: pass, 6 of 6 criteria"
    rows = read_csv(directory / "predict.csv")
    errors = [row["error"] for row in rows if row["law"] == "MultiPower" and row["fit_set"] == study.EARLY]
    assert len(errors) == 2 and max(map(abs, errors)) < 0.01
    laws = [row for row in read_csv(directory / "laws.csv") if row["law"] == "MultiPower"]
    assert {row["parameter"] for row in laws} == {field.name for field in dataclasses.fields(MultiPower)}
    assert {row["law"] for row in read_csv(directory / "curves.csv")} == {"Tissue", "MultiPower", "ConvexBound"}
    report = json.loads((directory / "study.json").read_text())
    assert report["study"] == "predict" and report["arguments"]["schedules"] == str(tmp_path / "schedules")
    assert report["fit_sets"][study.EARLY] == ["constant", *EARLY]
    solved = Lines.read(directory / "fits.jsonl")
    assert len(solved) == 9
    monkeypatch.setattr(study.Fit, "solve", None)  # nothing is solved twice
    assert run("predict", tmp_path / "schedules") == (0, said)
    assert Lines.read(directory / "fits.jsonl") == solved and read_csv(directory / "predict.csv") == rows


def test_bad_input_is_one_line(plan, tmp_path):
    code, said = run("predict", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in said
    write_study(tmp_path / "schedules", {"cosine": plan["cosine"]})
    code, said = run("predict", tmp_path / "schedules")
    assert code == 2 and "none is constant after its warm-up" in said
    write_study(tmp_path / "failed", plan, status="failed")
    code, said = run("predict", tmp_path / "failed")
    assert code == 2 and "failed/trials.csv: no run came to its end" in said
    code, said = run("predict", tmp_path / "schedules", f"--public={tmp_path}")
    assert code == 2 and "csv_25/constant_24000.csv: No such file" in said
    code, said = run("predict", tmp_path / "schedules", "--laws=tissue")
    assert code == 2 and "unknown flag --laws=tissue; expected one of --schedules" in said
