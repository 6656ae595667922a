"""The search for MiniCPM's constants: its judgement on made-up losses, its bowl, and the command as users meet it."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import tunnel_jobs

from cpmjax import study
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv
from cpmjax.tunnel import search, search_figures
from cpmjax.tunnel.search import PARAMETERS
from cpmjax.tunnel.search_bowl import fit
from cpmjax.tunnel.search_workers import Ended, Taken
from cpmjax.tunnel.trials import Diverged

ROOT = Path(__file__).parents[2]
SPACE = {"scale_depth": (0.3, 6.0), "scale_emb": (1.0, 50.0), "init_std": (0.01, 1.0), "learning_rate": (0.001, 0.1)}
BOUNDS = np.array([SPACE[name] for name in PARAMETERS]).T
OWN = {"scale_depth": 1.4, "scale_emb": 12.0, "init_std": 0.1, "learning_rate": 0.01}
OPTIMUM = np.array([2.0, 8.0, 0.06, 0.02])
COSTS = np.array([0.002, 0.004, 0.01, 0.05])  # nats an octave from the optimum, squared


def bowl(values):
    """3.5 nats at the optimum; the experiment's own values cost 0.058."""
    octaves = np.log2(np.array([values[name] for name in PARAMETERS]) / OPTIMUM)
    return 3.5 + float(COSTS @ octaves**2)


def drawn(count, seed=0):
    """Trials as a search leaves them, log-uniform: number, values."""
    draw = np.random.default_rng(seed)
    values_TD = 2.0 ** draw.uniform(*np.log2(BOUNDS), size=(count, len(PARAMETERS)))
    return [OWN, *(dict(zip(PARAMETERS, row.tolist(), strict=True)) for row in values_TD[1:])]


def table(values, losses, confirmed=()):
    """Rows of a search, and of confirmations given as {number: losses by fresh seed}."""
    rows = []
    for number, (each, loss) in enumerate(zip(values, losses, strict=True)):
        labels = {"stage": "search", "number": number, "worker": 1 + number % 2} | each | {"seed": 0}
        if math.isfinite(loss):
            for step, more in ((10, 1.0), (20, 0.0)):
                rows.append(labels | {"status": "finished", "step": step, "heldout_loss": loss + more})
        else:
            rows.append(labels | {"status": "diverged"})
    for number, found in dict(confirmed).items():
        for seed, loss in enumerate(found, 1):
            labels = {"stage": "confirmation", "number": number} | values[number] | {"seed": seed}
            rows.append(labels | {"status": "finished", "step": 20, "heldout_loss": loss})
    return rows


# The bowl.


def test_a_planted_optimum_is_found_with_its_costs_and_its_uncertainty():
    values = np.array([[each[name] for name in PARAMETERS] for each in drawn(200)])
    exact = np.array([bowl(each) for each in drawn(200)])
    found = fit(values, exact, BOUNDS)
    assert found.value_D == pytest.approx(OPTIMUM, rel=1e-4) and found.residual < 1e-6
    assert found.octave_costs() == pytest.approx(COSTS, rel=1e-6)
    assert found(np.log2(values)) == pytest.approx(exact)
    # 0.02 nats are sqrt(0.02 / cost) octaves: 2 for the third, beyond the range for the first.
    flat = found.flat_2D(0.02)
    assert np.log2(flat[1] / OPTIMUM)[1:] == pytest.approx(
        np.minimum(np.sqrt(0.02 / COSTS), np.log2(BOUNDS[1] / OPTIMUM))[1:], abs=0.02
    )
    assert flat[1, 0] == pytest.approx(BOUNDS[1, 0])
    noisy = fit(values, exact + np.random.default_rng(1).normal(0, 0.01, len(exact)), BOUNDS)
    low, high = noisy.interval_2D
    assert (low < OPTIMUM).all() and (high > OPTIMUM).all()
    assert 0.005 < noisy.residual < 0.013
    assert high[3] / low[3] < high[0] / low[0]  # what costs more is known better


def test_an_optimum_beyond_the_ranges_is_at_their_edge():
    values = np.array([[each[name] for name in PARAMETERS] for each in drawn(200)])
    found = fit(values, 0.1 * ((np.log2(values / (OPTIMUM * [1, 1, 1, 64]))) ** 2) @ COSTS, BOUNDS)
    assert found.value_D[3] == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(6))
def test_no_point_of_the_ranges_lies_lower_than_the_optimum(seed):
    """Also where that is on a face, an edge or a corner; a saddle becomes a trough."""
    draw = np.random.default_rng(seed)
    curvature_DD = draw.normal(size=(4, 4)) * 1e-4
    x_TD = draw.uniform(*np.log2(BOUNDS), size=(100, 4))
    found = fit(2.0**x_TD, np.einsum("td,de,te->t", x_TD, curvature_DD, x_TD), BOUNDS)
    points_BD = draw.uniform(*np.log2(BOUNDS), size=(100_000, 4))
    corners_BD = np.stack(np.meshgrid(*np.log2(BOUNDS).T), axis=-1).reshape(-1, 4)
    lowest = found(found.optimum_D[None])[0]
    assert lowest <= found(np.concatenate([points_BD, corners_BD])).min() + 1e-9
    assert (found.value_D > BOUNDS[0] * 0.999).all() and (found.value_D < BOUNDS[1] * 1.001).all()
    assert np.linalg.eigvalsh(found.curvature_DD).min() > -1e-12


def test_a_bowl_is_fitted_to_trials_near_the_best_and_needs_enough_of_them():
    values = np.array([[each[name] for name in PARAMETERS] for each in drawn(300)])
    losses = np.array([bowl(each) for each in drawn(300)])
    far = losses > losses.min() + 0.1
    assert far.sum() > 100
    broken = np.where(far, np.inf, losses)
    assert fit(values, broken, BOUNDS).value_D == pytest.approx(OPTIMUM, rel=1e-4)
    assert fit(values, np.where(far, 9.0, losses), BOUNDS).trials == (~far).sum()
    near = np.flatnonzero(~far)
    assert fit(values[near[:29]], losses[near[:29]], BOUNDS) is None
    assert fit(values[near[:30]], losses[near[:30]], BOUNDS) is not None


# Judgement.


def test_what_the_table_holds_is_found_again():
    values = drawn(300)
    losses = [bowl(each) for each in values]
    losses[5] = math.inf
    found = search.findings(table(values, losses, {0: [3.6, 3.7], 9: [3.58, 3.66]}), SPACE)
    assert found.numbers_T.tolist() == list(range(300)) and set(found.workers_T) == {1, 2}
    assert found.losses_T.tolist() == losses and found.best == int(np.argmin(losses))
    assert found.rank == 1 + sum(loss < losses[0] for loss in losses)
    assert found.bowl.value_D == pytest.approx(OPTIMUM, rel=1e-3)
    own, other = found.confirmed
    assert own.gain == (0.0, 0.0) and other.gains_S == pytest.approx([0.02, 0.04])
    # Student's t of two: 12.706 standard errors.
    assert other.gain == pytest.approx((0.03, 12.706 * 0.01), rel=1e-3)
    text = search.describe(found, dict.fromkeys(PARAMETERS, 0.25))
    assert "300 trials by 2 workers, 1 diverged" in text and "+0.0300 ± 0.1271" in text
    for name, figure in search_figures.all_of(found, dict.fromkeys(PARAMETERS, 0.25)).items():
        figure.savefig(io.BytesIO())
        assert name in ("history", "importance", "contours")


def test_few_trials_and_all_others_diverged_are_drawn_and_described_all_the_same():
    found = search.findings(table(drawn(3), [3.6, math.inf, math.inf]), SPACE)
    assert found.bowl is None and found.best == 0 and found.rank == 1 and found.confirmed == ()
    assert "3 trials by 2 workers, 2 diverged" in search.describe(found, dict.fromkeys(PARAMETERS, 0.25))
    for figure in search_figures.all_of(found, dict.fromkeys(PARAMETERS, 0.25)).values():
        figure.savefig(io.BytesIO())
    with pytest.raises(UserError, match="trial 0"):
        search.findings(table(drawn(3), [3.6, 3.5, 3.7])[2:], SPACE)


def judged(confirmed, asked=4, losses=(3.6, 3.5, 3.55, 3.7)):
    found = search.findings(table(drawn(len(losses)), losses, confirmed), SPACE)
    return {verdict.criterion: verdict for verdict in search.verdicts(found, asked)}


@pytest.mark.parametrize("asked, passes", [(4, True), (5, False)])
def test_a_search_that_is_not_whole_fails(asked, passes):
    assert judged({}, asked)["every trial asked for has ended"].passed is passes


@pytest.mark.parametrize("cost, passes", [(0.049, True), (0.051, False)])
def test_own_values_that_cost_too_much_fail(cost, passes):
    """Whichever of the confirmed is the best one."""
    own = [3.61, 3.60, 3.62]
    found = judged({0: own, 1: own, 2: [loss - cost for loss in own]})
    verdict = found["cost against the best on fresh seeds"]
    assert verdict.passed is passes and verdict.measured.startswith(f"{cost:.4f} ± 0.0000")


@pytest.mark.parametrize("worse, passes", [(0.01, True), (0.06, False)])
def test_a_best_trial_that_was_only_luck_fails(worse, passes):
    """Worse than the own values on fresh seeds, by 0.06 ± 0.05 or within that."""
    own = np.array([3.61, 3.60, 3.62])
    mine = own + worse + np.array([-0.02, 0.0, 0.02])
    found = judged({0: own, 1: mine, 2: own - 0.2})
    assert found["holds on fresh seeds"].passed is passes


def test_a_best_trial_that_diverges_on_a_fresh_seed_fails():
    found = judged({0: [3.6, 3.6], 1: [3.5, math.inf], 2: [3.6, 3.6]})
    assert not found["holds on fresh seeds"].passed and found["cost against the best on fresh seeds"].passed


def test_importance_ranks_what_was_planted():
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    from cpmjax.tunnel.search_importance import importances

    values = drawn(300)
    values_TD = np.array([[each[name] for name in PARAMETERS] for each in values])
    found = importances(SPACE, values_TD, [bowl(each) for each in values])
    assert sum(found.values()) == pytest.approx(1) and max(found, key=found.get) == "learning_rate"
    # A cliff counts: everything that ends is equal, what diverges lies at large init_std.
    losses = [3.5 if each["init_std"] < 0.1 else math.inf for each in values]
    found = importances(SPACE, values_TD, losses)
    assert max(found, key=found.get) == "init_std"


# Trials.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def small(folder):
    return tunnel_jobs.experiment(folder)


def test_the_values_of_a_trial_are_those_of_its_experiment(folder):
    config = tunnel_jobs.config(folder, "--run.seed=7")
    values = drawn(2)[1]
    planned = search.to_train(config, Taken(4, values), 2)
    assert [trial.labels["seed"] for trial in planned] == [7, 8] == [trial.config.run.seed for trial in planned]
    for trial in planned:
        model = trial.config.model
        assert (model.scale_depth, model.scale_emb, model.init_std) == tuple(values[name] for name in PARAMETERS[:3])
        assert trial.config.optimizer.learning_rate == values["learning_rate"]
        assert {name: trial.labels[name] for name in PARAMETERS} == values and trial.labels["number"] == 4
        own = replace(trial.config, model=config.model, optimizer=config.optimizer, run=config.run)
        assert own == config  # nothing else is changed
    assert search.own_values(config, SPACE) == OWN
    with pytest.raises(UserError, match=r"--init-std = 0\.2,1: expected a range with the experiment's own 0\.1 in it"):
        search.own_values(config, SPACE | {"init_std": (0.2, 1.0)})


def test_the_best_train_again_on_seeds_that_the_search_has_not_seen(folder):
    config = tunnel_jobs.config(folder)
    losses = [3.6, 3.5, math.inf, 3.4, 3.7, None]
    status = {None: "failed", math.inf: "diverged"}
    ended = [
        Ended(
            n,
            1,
            values,
            [{"status": status.get(loss, "finished"), "rows": [{"heldout_loss": loss}]}] * 2,
            loss is not None,
        )
        for n, (values, loss) in enumerate(zip(drawn(6), losses, strict=True))
    ]
    assert [search.loss_of(each.outcomes) for each in ended] == losses
    again = search.confirming(config, ended, best=2, seeds=2, fresh=3)
    places = [(trial.labels["number"], trial.labels["seed"] - config.run.seed) for trial in again]
    assert places == [(number, seed) for number in (0, 3, 1) for seed in (2, 3, 4)]
    assert {trial.labels["stage"] for trial in again} == {"confirmation"}
    names = {trial.identity("") for trial in [*again, *(trial for trial, _ in search.searched(config, ended))]}
    assert len(names) == 9 + 12
    assert search.confirming(config, ended[1:], 2, 2, 3) == []


# The command.


def run(*arguments: object) -> tuple[int, str]:
    return tunnel_jobs.run_study("search", *arguments)


def planted(monkeypatch, loss=bowl):
    """Trials take no time and have planted losses, a little different from seed to seed; the list of those trained."""
    trained = []

    def measure(bench, trial):
        trained.append(trial)
        found = loss(trial.labels)
        if not math.isfinite(found):
            raise Diverged("loss or gradient not finite by step 1", [])
        noise = np.random.default_rng([trial.config.run.seed, len(trained)]).normal(0, 0.002)
        return [{"step": 12, "loss": found, "heldout_loss": found + float(noise)}]

    measure.__module__ = search.__name__
    monkeypatch.setattr(study.search.transfer, "measure", measure)
    return trained


def test_the_command_finds_a_planted_optimum_and_what_mattered(small, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    trained = planted(monkeypatch)
    flags = [small, f"--run.directory={tmp_path}", "--trials=60", "--best=2", "--fresh-seeds=3"]
    code, said = run(*flags)
    # The own values cost 0.058 where 0.05 is allowed.
    assert code == 1 and "the experiment's own values: cost against the best on fresh seeds (0.05" in said
    assert len(trained) == 60 + 9
    rows = read_csv(tmp_path / "trials.csv")
    found = search.findings(rows, SPACE)
    assert len(rows) == 69 and np.abs(np.log2(found.bowl.value_D / OPTIMUM))[2:] == pytest.approx(0, abs=0.5)
    importance = {row["parameter"]: row["importance"] for row in read_csv(tmp_path / "importance.csv")}
    assert max(importance, key=importance.get) == "learning_rate"
    assert {"trials.jsonl", "search.log", "history.png", "importance.png", "contours.png"} <= set(os.listdir(tmp_path))
    report = json.loads((tmp_path / "study.json").read_text())
    assert report["arguments"]["trials"] == 60 and report["arguments"]["learning_rate"] == [0.001, 0.1]
    assert [verdict["passed"] for verdict in report["verdicts"]] == [True, True, False]

    before = (tmp_path / "trials.jsonl").read_bytes()
    assert run(*flags)[0] == 1 and len(trained) == 69 and (tmp_path / "trials.jsonl").read_bytes() == before
    run(*flags, "--trials=62")
    assert len(trained) >= 71 and (tmp_path / "trials.jsonl").read_bytes().startswith(before)


def test_a_kill_loses_one_trial_and_the_table_holds_what_has_ended(small, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    flags = [small, "--trials=12", "--best=1", "--fresh-seeds=2"]
    planted(monkeypatch, bowl)
    run(*flags, f"--run.directory={tmp_path / 'whole'}")

    def stops(labels):
        if labels["stage"] == "search" and labels["number"] == 7 and not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return bowl(labels)

    stopped = []
    trained = planted(monkeypatch, stops)
    flags += [f"--run.directory={tmp_path / 'killed'}"]
    assert run(*flags)[0] == 130
    assert [row["number"] for row in read_csv(tmp_path / "killed" / "trials.csv")] == list(range(7))
    assert run(*flags)[0] in (0, 1)
    numbers = [trial.labels["number"] for trial in trained if trial.labels["stage"] == "search"]
    assert numbers == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11]
    ledger = Lines.read(tmp_path / "killed" / "trials.jsonl")
    assert len({line["trial"] for line in ledger}) == len(ledger) == 16
    assert len(read_csv(tmp_path / "killed" / "trials.csv")) == 16


def test_real_trials_diverge_and_train_again(small, tmp_path):
    """Learning rates up to 1e30: most of such a search diverges, and each trial is a row."""
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    flags = [small, f"--run.directory={tmp_path}", "--learning-rate=0.001,1e30", "--best=1", "--fresh-seeds=2"]
    code, said = run(*flags, "--trials=8", "--seeds=2")
    assert code in (0, 1) and "trials diverged; the first one: loss or gradient not finite by" in said
    rows = read_csv(tmp_path / "trials.csv")
    of_search = [row for row in rows if row["stage"] == "search"]
    assert {(row["number"], row["seed"] - 3) for row in of_search} == {(n, s) for n in range(8) for s in range(2)}
    assert {row["status"] for row in rows} == {"finished", "diverged"}
    again = {(row["number"], row["seed"] - 3) for row in rows if row["stage"] == "confirmation"}
    assert {seed for _, seed in again} == {2, 3} and len({number for number, _ in again}) <= 2
    finished = [row for row in rows if row["status"] == "finished"]
    assert all(row["step"] in (4, 8, 12) and row["heldout_loss"] > 0 for row in finished)


def test_a_trial_that_fails_is_a_row_fails_the_study_and_is_tried_again(small, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    broken = {3}

    def fails(labels):
        if labels["number"] in broken:
            raise MemoryError("no room")
        return bowl(labels)

    trained = planted(monkeypatch, fails)
    flags = [small, f"--run.directory={tmp_path}", "--trials=6", "--best=1", "--fresh-seeds=2"]
    code, said = run(*flags)
    assert code == 1 and "failed; the first one: MemoryError: no room" in said
    assert [trial.labels["number"] for trial in trained].count(3) == 1  # by its worker, not again at the end
    assert "every trial asked for has ended (5, bar 6)" in said.splitlines()[-1]
    assert [row["number"] for row in read_csv(tmp_path / "trials.csv") if row["status"] == "failed"] == [3]
    broken.clear()
    trained.clear()
    code, said = run(*flags)
    assert "failed" not in said and trained[0].labels["number"] == 3
    assert len([trial for trial in trained if trial.labels["stage"] == "search"]) == 1
    broken.add(0)
    code, said = run(*flags, f"--run.directory={tmp_path / 'other'}")
    assert code == 2 and said.startswith("trial 0")


@pytest.mark.slow
def test_the_same_command_twice_is_two_workers(small, tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    flags = [small, f"--run.directory={tmp_path}", "--trials=30", "--best=1", "--fresh-seeds=2"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "cpmjax.study", "search", *map(str, flags)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert all(process.returncode in (0, 1) for process in both), said
    assert said[0][0] == said[1][0] and both[0].returncode == both[1].returncode
    lines = Lines.read(tmp_path / "trials.jsonl")
    assert len({line["trial"] for line in lines}) == len(lines) == 30 + 4
    numbers = [line["labels"]["number"] for line in lines if line["labels"]["stage"] == "search"]
    assert sorted(numbers) == list(range(30))


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--trials=0", "'0'"),
        ("--fresh-seeds=1", "expected at least 2"),
        ("--init-std=1,0.01", "expected two positive numbers, the lower one first, got '1,0.01'"),
        ("--init-std=0.01", "expected two positive numbers"),
        ("--init-std=0.2,1", "--init-std = 0.2,1: expected a range with the experiment's own 0.1 in it"),
        ("--size=tunnel-10m", "tunnel-10m: expected one of minicpm-2b, "),
        ("--storage=nonsense", "--storage = nonsense: "),
        ("--rates=1", "unknown flag --rates=1; expected one of --trials"),
        ("--data.held_out=0", "data.held_out = 0"),
    ],
)
def test_bad_input_is_one_line_that_names_it(flag, said, small, tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    code, line = run(small, f"--run.directory={tmp_path / 'study'}", flag)
    assert code == 2 and said in line, line
    assert not (tmp_path / "study" / "study.json").exists()


def test_without_optuna_one_line_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, line = run(small, f"--run.directory={tmp_path / 'study'}")
    assert code == 2 and line == "the search needs Optuna: pip install 'cpmjax[search]'"
    assert not (tmp_path / "study").exists()


def test_a_directory_that_is_a_run_is_refused(small, tmp_path):
    pytest.importorskip("optuna", reason="needs Optuna, which searches")
    (tmp_path / "config.yaml").write_text("# fingerprint: 0\n")
    code, line = run(small, f"--run.directory={tmp_path}")
    assert code == 2 and "is a run; expected a directory of its own" in line
    assert not (tmp_path / "search.log").exists()
