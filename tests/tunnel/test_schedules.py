"""Schedules side by side: what is planned, the rates of all updates, what is measured and how it is judged."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jobs
import numpy as np
import pytest
import tunnel_jobs
from scipy import stats

from cpmjax import study
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSDS
from cpmjax.run.table import read_csv
from cpmjax.studies import schedules as command
from cpmjax.training.origin import Origin
from cpmjax.training.timeline import Timeline
from cpmjax.tunnel import schedules, schedules_figures, schedules_report
from cpmjax.tunnel.paired import t_interval
from cpmjax.tunnel.schedules_measure import measure

PEAKS = (0.005, 0.01, 0.02)  # of the cosine twice those
TOTAL, WARMUP = 40, 2
SCHEDULE = {"warmup": WARMUP, "stable": TOTAL - WARMUP - 4, "decay": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def config(folder):
    keys = [f"--schedule.{key}={value}" for key, value in SCHEDULE.items()]
    return schedules.in_steps(tunnel_jobs.config(folder, *keys, "--optimizer.learning_rate=0.01"))


def planned(config, seeds=2, best=0.02):
    return schedules.make_trials(config, PEAKS, seeds) + schedules.make_period_trials(config, best, seeds)


# What is planned.


def test_every_run_has_one_name_and_every_seed_the_same_runs(config):
    trials = planned(config)
    names = [[t.labels["run"] for t in trials if t.config.run.seed == seed] for seed in (0, 1)]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])
    assert {"constant", "constant, peak 0.02", "wsd 10%", "wsd 20% linear", "wsd-s"} < {*names[0]}
    assert {"cosine", "cosine, peak 0.04", "cosine(2S), peak 0.02"} < {*names[0]}
    assert all(trial.labels["seed"] == trial.config.run.seed for trial in trials)
    assert all(trial.labels["after"] == trial.after for trial in trials)


def test_all_that_is_compared_ends_at_the_same_step(config):
    early = {"wsd 10% ending at 40%": 16, "wsd 10% ending at 50%": 20, "wsd 10% ending at 60%": 24}
    early |= {"wsd 10% ending at 80%": 32, "cosine(S/2)": 20}
    for trial in planned(config):
        assert trial.total == early.get(trial.labels["method"], TOTAL), trial.labels


def test_a_branch_has_had_the_rates_of_its_trunk_and_its_state_is_kept(config):
    plan = schedules.plan_of(planned(config))
    branches = [trial for trial in planned(config) if trial.trunk is not None]
    assert len(branches) == 2 * (len(planned(config)) // 2 - 2 * 3 - 1 - 2)  # not trunks, cosines, other periods
    for trial in branches:
        assert trial.after in trial.trunk.keep
        assert trial.trunk.config.run.seed == trial.config.run.seed
        own, trunks = (schedules.rates(plan[each.labels["run"]]) for each in (trial, trial.trunk))
        assert np.array_equal(own[: trial.after], trunks[: trial.after]) and len(own) == trial.total


def test_lengths_follow_the_experiment_in_steps_or_in_tokens(config):
    tokens = config.batches.tokens(1)
    counted = replace(config.schedule, unit="tokens", **{key: 3 * tokens * value for key, value in SCHEDULE.items()})
    longer = schedules.in_steps(replace(config, schedule=counted))
    for short, long in zip(planned(config, 1), planned(longer, 1), strict=True):
        assert short.labels | {"after": 0} == long.labels | {"after": 0}
        assert long.total == 3 * short.total and abs(long.after - 3 * short.after) <= 2


@pytest.mark.parametrize(
    "keys, message",
    [
        (["--schedule.type=cosine"], "schedule.type = cosine: expected wsd"),
        (["--schedule.shape=linear", "--schedule.floor=0"], "schedule.floor = 0: expected more"),
        (["--schedule.stable=20"], "schedule: 26 steps with 2 of warm-up; expected at least 40"),
        (["--schedule.warmup=14", "--schedule.stable=22"], "ends before step 14"),
    ],
)
def test_an_experiment_that_cannot_be_compared_is_one_line(folder, keys, message):
    base = [f"--schedule.{key}={value}" for key, value in SCHEDULE.items() if "type" not in keys[0]]
    if keys == ["--schedule.type=cosine"]:
        base = []
    with pytest.raises(UserError, match=message):
        schedules.in_steps(tunnel_jobs.config(folder, *base, *keys))


# The rates of all updates.


def test_the_rates_are_those_of_the_paper(config):
    plan = schedules.plan_of(planned(config, best=0.01))
    rates = {run: schedules.rates(segments) for run, segments in plan.items()}
    assert rates["constant"] == pytest.approx([0.005] + [0.01] * 39)
    assert rates["wsd 10%"][35:] == pytest.approx([0.01] + [0.01 * 0.1 ** (k / 4) for k in (1, 2, 3, 4)])
    assert rates["wsd 10%, peak 0.02"][-1] == pytest.approx(0.002)
    assert rates["wsd 10% half_life"][-1] == pytest.approx(0.01 * 0.5**3.7)
    assert rates["wsd 2.5%"][-2:] == pytest.approx([0.01, 0.001])
    assert rates["cosine"][20] == pytest.approx(0.001 + 0.009 * (1 + math.cos(math.pi * 19 / 38)) / 2)
    assert rates["cosine(S/2), then its floor"][19:] == pytest.approx([0.001] * 21)
    assert rates["cosine(2S)"][-1] == pytest.approx(0.001 + 0.009 * (1 + math.cos(math.pi * 38 / 78)) / 2)
    again = rates["wsd-s"]
    assert again[19] == pytest.approx(0.001) and again[20] == pytest.approx(0.01) and again[-1] == pytest.approx(0.001)
    loop = rates["cosine-loop"]
    assert loop[-1] < 0.0012 and loop[14] < 0.0012 and loop[27] > 0.0099


@pytest.mark.parametrize("mode", ["coupled", "scaled", "independent"])
def test_a_cosine_stays_at_its_floor_with_its_weight_decay(config, mode):
    optimizer = replace(config.optimizer, weight_decay_mode=mode, weight_decay=0.1)
    trials = {trial.labels["run"]: trial for trial in planned(replace(config, optimizer=optimizer), 1, 0.01)}
    tail = trials["cosine(S/2), then its floor"]
    before, after = (Timeline(trial.config, Origin({})) for trial in (tail.trunk, tail))
    assert after.rates(tail.after + 1) == pytest.approx(before.rates(tail.after)) and tail.total == TOTAL


def test_a_plan_is_read_back_as_it_was_written(config, tmp_path):
    plan = schedules.plan_of(planned(config))
    schedules.save_plan(tmp_path, plan)
    assert schedules.load_plan(tmp_path) == plan
    with pytest.raises(UserError, match=r"has no schedules\.json"):
        schedules.load_plan(tmp_path / "elsewhere")


def made_up(config, loss, diverged=(), best=0.02, seeds=3):
    """Rows of a study: loss(run, peak, share of S) at a quarter of S, at every end and at the end."""
    rows = []
    for trial in planned(config, seeds, best):
        labels = trial.labels | {"status": "finished"}
        if labels["run"] in diverged:
            rows.append(labels | {"status": "diverged"})
            continue
        shift = 0.05 * labels["seed"]
        for step in (step for step in (10, 16, 20, 24, 32, 40) if trial.after < step <= trial.total):
            value = shift + 1 - step / TOTAL + loss(labels["method"], labels["learning_rate"], step / TOTAL)
            rows.append(labels | {"step": step, "loss": value, "heldout_loss": value})
        if labels["run"] == "constant":
            for name in ("lawa 10%", "wsm 10%", "lawa 20%", "wsm 20%"):
                value = shift + loss(name, 0.01, 1.0)
                rows.append(labels | {"method": name, "run": name, "after": 40, "step": 40, "heldout_loss": value})
    return rows


def papers(method, peak, share):
    """Losses above those of the best, of a world in which the paper is right."""
    bowl = 0.02 * math.log2(peak / (0.02 if method.startswith("cosine") else 0.01)) ** 2
    known = {"constant": 3.2, "wsd 2.5%": 3.1, "cosine": 3.005, "cosine(2S)": 3.04, "cosine(S/2), then its floor": 3.02}
    known |= {"lawa 10%": 3.1, "wsm 10%": 3.05, "lawa 20%": 3.0, "wsm 20%": 3.2, "wsd 20%": 2.95}
    return bowl + known.get(method, 3.0)


def test_curves_are_the_runs_that_came_to_their_end(config):
    plan = schedules.plan_of(planned(config))
    rows = made_up(config, papers, diverged=["cosine, peak 0.02"])
    found = {(curve.run, curve.seed): curve for curve in schedules.curves(rows, plan)}
    assert {run for run, _ in found} == plan.keys() - {"cosine, peak 0.02"}
    curve = found["wsd-s", 1]
    assert curve.steps_T.tolist() == [24, 32, 40] and curve.steps_T.dtype.kind == "i" and curve.warmup == WARMUP
    assert curve.losses_T == pytest.approx([3.05 + 0.4, 3.05 + 0.2, 3.05])
    assert np.array_equal(curve.rates_S, schedules.rates(plan["wsd-s"])) and len(curve.rates_S) == TOTAL


# Judgement.


def judged(config, loss, **how):
    found = schedules_report.compare(made_up(config, loss, **how))
    return found, [verdict.passed for verdict in schedules_report.verdicts(found)]


def test_a_world_in_which_the_paper_is_right_passes(config):
    found, passed = judged(config, papers)
    assert passed == [True] * 8
    verdicts = schedules_report.verdicts(found)
    assert verdicts[0].measured == "-0.2000 (-0.2000 to -0.2000)"  # seeds differ, their differences do not
    assert verdicts[3].measured.startswith("-0.0050") and verdicts[5].measured.startswith("-0.2000")


@pytest.mark.parametrize(
    "fault, fails",
    [
        ({"constant": 3.029}, [0, 1]),
        ({("constant", 0.005): 3.029}, [1]),
        ({("cosine", 0.04): 2.995}, [2]),
        ({"cosine": 2.989}, [3]),
        ({"wsd 2.5%": 3.009}, [4]),
        ({"wsd 10% ending at 60%": 3.201}, [5]),
        ({"wsd-s": 3.011}, [6]),
        ({"cosine(2S)": 3.004}, [7]),
        ({"cosine(S/2), then its floor": 3.004}, [7]),
    ],
)
def test_each_planted_fault_fails_its_own_verdict(config, fault, fails):
    def loss(method, peak, share):
        return fault.get((method, peak), fault.get(method, papers(method, peak, share)))

    # A fault of a whole method has no bowl: the cosine's best peak stays inside.
    if "cosine" in fault:
        fault |= {("cosine", 0.01): 3.1, ("cosine", 0.04): 3.1}
    best = 0.04 if fails == [2] else 0.02
    _, passed = judged(config, loss, best=best)
    assert [index for index, each in enumerate(passed) if not each] == fails


def test_each_method_is_taken_at_its_own_best_peak(config):
    def loss(method, peak, share):
        return papers(method, 2 * peak if method.startswith("wsd") else peak, share)

    found, passed = judged(config, loss)
    verdict = schedules_report.verdicts(found)[3]
    assert passed[3] and verdict.measured.startswith("-0.0050")  # at the same peak it would be +0.0150
    assert (found.best("wsd 10%").peak, found.best("cosine").peak) == (0.005, 0.02)
    assert found.at_edge("wsd 10%") and not found.at_edge("cosine")
    assert "wsd 10%   0.005, at the edge of the grid" in schedules_report.describe(found)


def test_steps_are_counted_from_where_a_run_began(config):
    """S = 40: 1,600 %. Decays of 4, 8 and 1 steps at the end; 2, 2, 2, 3 before; WSD-S is its second half."""
    found, _ = judged(config, papers)
    said = schedules_report.compute(found)
    trained = 40 + 7 * 4 + 3 * 8 + 1 + (2 + 2 + 2 + 3) + 20
    scratch = 40 + 7 * 40 + 3 * 40 + 40 + (16 + 20 + 24 + 32) + 40
    assert f"took {trained} steps; each from its beginning they would take {scratch}" in said
    assert "40, 50, 60, 80, 100 % of the length: 53 steps with one trunk" in said and "132 with a cosine each" in said


def test_merges_are_measured_in_drops_of_the_decay(config):
    found, _ = judged(config, papers)
    said = schedules_report.merges(found)
    for part in ("lawa 10% 50% (50% to 50%)", "wsm 10% 75%", "lawa 20% 80%", "wsm 20% 0%"):
        assert part in said, said


def test_shapes_are_apart_only_beyond_their_intervals(config):
    rows = made_up(config, papers)
    for row in rows:
        if row["run"] == "wsd 10% linear":
            row["heldout_loss"] += 0.02 + 0.001 * row["seed"]
        if row["run"] == "wsd 10% inverse":
            row["heldout_loss"] += 0.03 * (row["seed"] - 1)
    said = schedules_report.shapes(schedules_report.compare(rows))
    assert "7 within 0.0210 nats" in said and "linear +0.0210 (+0.0185 to +0.0235)" in said and "inverse" not in said


def test_what_diverged_is_no_best_and_is_drawn_without(config):
    diverged = ["cosine, peak 0.04", "cosine-loop, peak 0.02", "wsd 10% linear"]
    found, passed = judged(config, papers, diverged=diverged)
    assert passed == [True] * 8 and found.best("cosine").peak == 0.02
    plan = schedules.plan_of(planned(config))
    for figure in (schedules_figures.periods(found, plan), schedules_figures.branches(found, plan)):
        figure.canvas.draw()
    figure = schedules_figures.ends(found)
    figure.canvas.draw()
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "wsd 10%, peak 0.01" in shown and not {"cosine, peak 0.04", "wsd 10% linear, peak 0.01"} & {*shown}
    assert schedules_report.describe(found).count("diverged") == 3
    with pytest.raises(UserError, match=r"learning_rate = 0\.01: the constant rate diverged"):
        judged(config, papers, diverged=["constant"])


def test_an_interval_is_students():
    values = np.array([0.01, 0.03, -0.02, 0.02])
    interval = t_interval(values)
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx(expected) and interval.value == pytest.approx(0.01)
    assert math.isnan(t_interval(values[:1]).low)


# Trials.


@pytest.mark.slow
def test_a_merge_is_the_loss_of_the_mean_of_the_weights(config):
    trunk = next(trial for trial in planned(config, 1) if trial.labels["run"] == "constant")
    trunk = replace(trunk, keep=())
    kept = {}

    def observe(moment):
        kept[moment.step] = jax.device_get(moment.parameters)
        if moment.step == TOTAL:
            rates = 0.1 ** (np.arange(5) / 4)  # of a decay of 4 steps: each update with its share
            updates = [jax.tree.map(np.subtract, kept[36 + k], kept[35 + k]) for k in (1, 2, 3, 4)]
            decayed = kept[36]
            for share, update in zip(rates[1:], updates, strict=True):
                decayed = jax.tree.map(lambda x, u, share=share: x + share * u, decayed, update)
            mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(kept[36 + k] for k in range(5)))
            for name, parameters in (("lawa 10%", mean), ("wsm 10%", decayed)):
                yield {"method": name} | moment.program.evaluate(parameters, moment.scales.multipliers)

    with tunnel_jobs.workbench(config) as bench:
        rows = measure(bench, trunk)
        expected = bench.train(trunk, range(1, TOTAL + 1), observe)
    merges = {row["method"]: row for row in rows if "method" in row}
    assert merges.keys() == {"lawa 10%", "lawa 20%", "wsm 10%", "wsm 20%"}
    assert [row["step"] for row in rows if "method" not in row] == [*range(4, 41, 4)]
    for row in expected:
        assert merges[row["method"]]["heldout_loss"] == pytest.approx(row["heldout_loss"], abs=1e-5)
    last = next(row for row in rows if row["step"] == TOTAL)
    assert abs(last["heldout_loss"] - expected[0]["heldout_loss"]) > 1e-4  # or the two would say nothing


@pytest.mark.slow
def test_wsd_s_from_two_trunks_is_wsd_s_from_its_beginning(config):
    branch = next(trial for trial in planned(config, 1) if trial.labels["run"] == "wsd-s")
    assert isinstance(branch.config.schedule, WSDS) and branch.trunk.trunk is not None
    with tunnel_jobs.workbench(config) as bench:
        rows = measure(bench, branch)
        whole = measure(bench, replace(branch, trunk=None, after=0))
    assert [row["step"] for row in rows] == [24, 28, 32, 36, 38, 40]
    assert [row for row in whole if row["step"] > branch.after] == rows


def run(capsys, *arguments):
    """Exit code and stdout of the command."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    try:
        code = study.main(["schedules", *map(str, arguments)])
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_stopped(folder, tmp_path, capsys, monkeypatch):
    file = tunnel_jobs.experiment(folder, schedule=SCHEDULE)
    flags = [file, f"--run.directory={tmp_path}", "--seeds=1", "--peaks=0.5,1,2"]
    asked = []

    def stopping(bench, trial):
        asked.append(trial.labels["run"])
        if asked.count("wsd 10%") == 1 and asked[-1] == "wsd 10%":
            raise KeyboardInterrupt
        return measure(bench, trial)

    stopping.__module__ = measure.__module__
    monkeypatch.setattr(command, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *flags)
    before = Lines.read(tmp_path / "trials.jsonl")
    code, said = run(capsys, *flags)
    lines = Lines.read(tmp_path / "trials.jsonl")
    assert lines[: len(before)] == before and len({line["trial"] for line in lines}) == len(lines) == len(asked) - 1
    assert code in (0, 1) and said.splitlines()[-1].startswith("verdict: ")
    assert {"trials.csv", "schedules.json", "study.json", "fig4.png", "fig5.png", "ends.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    rows, plan = read_csv(tmp_path / "trials.csv"), schedules.load_plan(tmp_path)
    assert {row["run"] for row in rows} == plan.keys() | {"lawa 10%", "lawa 20%", "wsm 10%", "wsm 20%"}
    assert len(schedules.curves(rows, plan)) == len(plan) == len(lines)
    assert "one seed: no intervals" in said and "reuse saves" in said
    again, _ = run(capsys, *flags)
    assert again == code and len(Lines.read(tmp_path / "trials.jsonl")) == len(lines)


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--peaks=0.5,2,4", "--peaks = 0.5,2,4: expected at least three, each once, 1 among them"),
        ("--peaks=1,2", "at least three"),
        ("--peaks=1,1,2", "each once"),
        ("--data.held_out=0", "data.held_out = 0"),
        ("--schedule.type=constant", "schedule.type = constant: expected wsd"),
    ],
)
def test_bad_flags_are_one_line(folder, tmp_path, capsys, flag, message):
    file = tunnel_jobs.experiment(folder, schedule={} if "type" in flag else SCHEDULE)
    if "type" in flag:
        file.write_text(re.sub(r"schedule:\n(  .*\n)*", "", file.read_text()))
    with pytest.raises(UserError, match=re.escape(message)):
        run(capsys, file, f"--run.directory={tmp_path}", flag)
