"""`python -m cpmjax.study series`: what its runs are, and that it goes on after a kill and does nothing twice."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
from small_series import EARLY, LATE, ROOT, STEPS, command, environment, small_series

import cpmjax
from cpmjax.analysis.text import text_rows
from cpmjax.model.parameters import flat
from cpmjax.run import cli
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.schedule import WSD, Cosine
from cpmjax.run.table import read_csv
from cpmjax.study import parse
from cpmjax.tunnel.study_runs import members

NAMES = ["trunk", "decay10", "decay20", "constant", "cosine", "seed2", "mixed10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_series(tmp_path_factory)


@pytest.mark.parametrize("words", [["series"], ["series", str(ROOT / "experiments/study.yaml")]])
def test_where_the_series_is_unless_it_is_said(words):
    arguments, config = parse(words)
    assert config.run.directory == "runs/study" and arguments.cosine_peak == 2


def test_the_members_of_the_committed_experiment(tmp_path):
    config = cli.load([str(ROOT / "experiments/study.yaml"), f"--run.directory={tmp_path}"], {}, "")
    found = members(config, 2.0)
    assert [*found] == NAMES
    total = config.schedule.total
    assert {member.schedule.total for name, member in found.items() if name != "trunk"} == {total}
    assert found["trunk"].schedule.total == total - round(total / 10)
    # Every rate is what one schedule from the beginning would give.
    for name, decay in (("decay10", total // 10), ("decay20", total // 5)):
        whole = WSD(config.schedule.warmup, total - decay - config.schedule.warmup, decay, "exponential", 0.1)
        steps = range(1, total + 1)
        assert [found[name].schedule.factor(step) for step in steps] == [whole.factor(step) for step in steps]
        assert found[name].branch.step == total - decay
    assert isinstance(found["cosine"].schedule, Cosine) and found["cosine"].optimizer.learning_rate == 0.02
    assert {member.run.seed for member in found.values()} == {0, 1}
    for name, member in found.items():
        stable = {"code": 1.0}
        assert member.data.weights("decay") == (stable if name != "mixed10" else {"code": 0.7, "prose": 0.3})
    one_mixture = replace(config, data=replace(config.data, decay={}))
    assert [*members(one_mixture, 2.0)] == NAMES[:-1]


@pytest.mark.parametrize("schedule, expected", [(Cosine(5, 95), "type = cosine: expected wsd"), (WSD(9, 0, 1), "10")])
def test_a_schedule_that_has_no_room_for_the_branches(schedule, expected, tmp_path):
    config = cli.load([str(ROOT / "experiments/study.yaml"), f"--run.directory={tmp_path}"], {}, "")
    with pytest.raises(UserError, match=expected):
        members(replace(config, schedule=schedule), 2.0)


@pytest.mark.slow
def test_the_runs_of_a_series(folder):
    trunk = cpmjax.Series(folder)
    assert trunk.name == "trunk" and [*trunk.branches()] == ["constant", "decay10", "decay20", "mixed10"]
    assert trunk.steps[-1] == LATE and EARLY in trunk.steps
    assert [*trunk.decays()] == ["decay10", "decay20", "mixed10"]
    for name, line in trunk.branches().items():
        assert line.steps[-1] == STEPS and line.branch_step == (EARLY if name == "decay20" else LATE)
        assert [record["step"] for record in line.log()] == [*range(1, STEPS + 1)]
        assert line.optimizer_state(STEPS) is not None
    rows = read_csv(folder / "series.csv")
    assert [row["run"] for row in rows] == NAMES
    for row in rows:
        last = jobs.records(folder / row["run"])[-1]
        assert row["step"] == last["step"] and row["heldout_loss"] == last["heldout_loss"]
        assert row["heldout/prose"] == last["heldout/prose"]


@pytest.mark.slow
def test_a_series_that_is_stopped_goes_on_as_if_it_had_not_been(folder, tmp_path):
    again = tmp_path / "study"
    shutil.copytree(folder.parent / "cache", tmp_path / "cache")
    process = subprocess.Popen(command(again), env=environment(), stderr=subprocess.PIPE, text=True)
    while jobs.lines_of(again / "trunk") < 8:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, stderr = jobs.finish(process)
    assert code == 75 and stderr.splitlines()[-1] == "trunk ended with code 75; the same command goes on from there"
    saved = jobs.steps_of(again / "trunk")[-1]
    assert 8 <= saved < LATE

    # A branch of another trunk is no run of this series: where it is met, the trunk is whole.
    shutil.copytree(folder / "decay10", again / "decay10")
    code, stderr = jobs.finish(subprocess.Popen(command(again), env=environment(), stderr=subprocess.PIPE, text=True))
    assert code == 2 and "decay10 was made with another configuration: branch.run" in stderr
    assert stderr.splitlines()[-1] == "decay10 ended with code 2; the same command goes on from there"
    extra = {piece: value for piece, value in jobs.outcome(again / "trunk").items() if piece.startswith(f"{saved} ")}
    assert jobs.unequal(jobs.outcome(again / "trunk"), jobs.outcome(folder / "trunk") | extra) == []


@pytest.mark.slow
def test_a_series_that_is_there_is_left_alone(folder):
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "plots" not in path.parts}

    before = contents()
    done = subprocess.run(command(folder), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "heldout_loss" in done.stdout
    assert contents() == before


@pytest.mark.slow
def test_a_decay_is_the_trunk_until_it_leaves_it(folder):
    """seed2 is a whole WSD run; decay10 with its trunk is one as well, so their logs have the same rates."""
    trunk, decay = cpmjax.Series(folder), cpmjax.Series(folder / "decay10")
    for path, array in flat(decay.parameters(LATE)).items():
        np.testing.assert_array_equal(array, flat(trunk.parameters(LATE))[path])
    whole = cpmjax.Series(folder / "seed2")
    assert [record["learning_rate"] for record in decay.log()] == [record["learning_rate"] for record in whole.log()]
    assert [record["loss"] for record in decay.log()] != [record["loss"] for record in whole.log()]


def test_a_run_is_no_place_for_a_series(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.yaml").write_text("run: {}\n")
    done = subprocess.run(command(tmp_path / "study"), env=environment(), capture_output=True, text=True)
    assert jobs.error_line(done.returncode, done.stderr) == (
        f"{tmp_path / 'study'} is a run; expected a directory of its own for a series"
    )


def look(study: str, *arguments: str) -> str:
    """What a study of a run prints, or its error."""
    command = [sys.executable, "-m", "cpmjax.study", study, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else jobs.error_line(done.returncode, done.stderr)


@pytest.mark.slow
def test_an_atlas_of_a_run(folder, tmp_path):
    argv = ("atlas", str(folder), "--layers=1", f"--directory={tmp_path}")
    assert f"rows in {tmp_path / 'atlas.csv'}; notebooks/atlas_of_weights.ipynb" in look(*argv, "--steps=48,54")
    rows = {(row["step"], row["path"], row.get("layer")): row for row in read_csv(tmp_path / "atlas.csv")}
    series = cpmjax.Series(folder)
    before, after = (np.asarray(flat(series.parameters(step))["layers/gate"]) for step in (48, 54))
    found = rows[54, "layers/gate", 1]
    assert found["update"] == pytest.approx(np.linalg.norm((after - before)[1]), rel=1e-5)
    assert found["update_largest_singular_value"] == pytest.approx(np.linalg.norm((after - before)[1], 2), rel=1e-5)
    assert "stable_rank" not in rows[54, "layers/gate", 0]
    missing = look(*argv, "--steps=48,55")
    assert missing.startswith(f"{folder / 'trunk'} has no checkpoint of step 55: expected one of ")
    unexpected = "command line: unexpected --run.seed=1; expected one run, which says everything else itself"
    assert look(*argv, "--run.seed=1") == unexpected


@pytest.mark.slow
def test_barriers_of_a_run(folder, tmp_path):
    argv = ("barriers", str(folder / "decay20"), "--corpus=code", "--rows=4", "--inside=1", f"--directory={tmp_path}")
    assert f"1 pairs in {tmp_path / 'barriers.csv'}; the highest, " in look(*argv, "--steps=6,60")
    assert "3 pairs in " in look(*argv, "--steps=6,48,60")
    pieces = [line.get("piece") for line in Lines.read(tmp_path / "ledger.jsonl")[1:]]
    assert pieces == ["decay20 6, decay20 60", "decay20 6, decay20 48", "decay20 48, decay20 60"]  # none twice

    series = cpmjax.Series(folder / "decay20")
    batch = text_rows(series, "code", 4)
    ends = [series.parameters(step) for step in (6, 60)]
    middle = float(series.loss_of(jax.tree.map(lambda x, y: (x + y) / 2, *ends), batch))
    losses = {row["step"]: row["loss"] for row in read_csv(tmp_path / "losses.csv")}
    assert [losses[6], losses[60]] == pytest.approx([series.loss(6, batch), series.loss(60, batch)], abs=1e-5)
    (found,) = [row for row in read_csv(tmp_path / "barriers.csv") if (row["from"], row["to"]) == (6, 60)]
    assert found["barrier"] == pytest.approx(max(0, middle - (losses[6] + losses[60]) / 2), abs=1e-5)

    assert "ledger.jsonl: is of another series, or was asked otherwise" in look(*argv, "--rows=5")
    assert look(*argv, "--steps=6").startswith("--steps: a barrier is between two checkpoints")
    assert "expected one of standard_library" in look(*argv, "--corpus=nothing")
