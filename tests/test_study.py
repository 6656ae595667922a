"""`python -m cpmjax.study` as its users meet it: exit codes, last lines, files, kills, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jobs
import pytest
import tunnel_jobs
from tunnel_jobs import run_study as run
from tunnel_jobs import without_clock

from cpmjax import study
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv
from cpmjax.tunnel import transfer
from cpmjax.tunnel.faults import FAULTS

ROOT = Path(__file__).parents[1]
FAMILY = ROOT / "experiments" / "tunnel" / "family.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def small(folder):
    return tunnel_jobs.experiment(folder)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cpmjax.study", *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.smoke
def test_a_short_coordinate_check_passes_and_a_planted_fault_fails_it(folder, tmp_path):
    """Two widths, one fault: the exit code and the last line say what was found."""
    flags = ["coordinate-check", FAMILY, f"--run.cache={folder / 'cache'}", "--layers="]
    code, said = run(*flags, "--widths=64,512", f"--run.directory={tmp_path}")
    assert code == 0, said
    assert said.splitlines()[-1] == "verdict: pass, 2 of 2 criteria"
    assert {"trials.csv", "trials.jsonl", "slopes.csv", "width.png", "study.json"} <= set(os.listdir(tmp_path))
    names = "--parametrisations=minicpm,slow_embedding"
    code, said = run(*flags, "--widths=64,512", f"--run.directory={tmp_path}", names)
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("verdict: FAIL: slow_embedding: coordinates over width (change of embedding at step ")
    assert "minicpm:" not in last
    report = json.loads((tmp_path / "study.json").read_text())
    assert report["machine"]["cores"] == os.cpu_count() and report["versions"]["jax"] == jax.__version__
    assert report["arguments"]["seeds"] == 3 and [verdict["passed"] for verdict in report["verdicts"]] == [
        True,
        True,
        False,
        True,
    ]
    assert len(read_csv(tmp_path / "trials.csv")) == 2 * len(Lines.read(tmp_path / "trials.jsonl")[0]["rows"]) * 2 * 3


def test_the_controls_are_planted_beside_what_was_asked_and_must_be_caught(small, tmp_path, monkeypatch):
    for name in set(FAULTS) - {"slow_embedding"}:
        monkeypatch.delitem(FAULTS, name)
    flags = ["coordinate-check", small, f"--run.directory={tmp_path}", "--seeds=1", "--layers=", "--controls"]
    _, said = run(*flags, "--widths=16,32")
    assert "fault slow_embedding  is caught" in said and "slow_embedding:" not in said.splitlines()[-1]
    monkeypatch.setitem(FAULTS, "slow_embedding", replace(FAULTS["slow_embedding"], bar=100.0))
    code, said = run(*flags, "--widths=16,32")
    assert code == 1 and "fault slow_embedding: is caught (" in said.splitlines()[-1]


def test_widths_and_depths_in_one_table(small, tmp_path):
    """The smallest width at the base depth is the smallest depth as well: trained once, in the table twice."""
    code, said = run(
        "coordinate-check", small, f"--run.directory={tmp_path}", "--seeds=1", "--widths=16,32", "--layers=1,2"
    )
    assert code in (0, 1) and said.splitlines()[-1].startswith("verdict: ")
    assert len(Lines.read(tmp_path / "trials.jsonl")) == 3
    places = {(row["axis"], row[row["axis"]]) for row in read_csv(tmp_path / "trials.csv")}
    assert places == {("width", 16), ("width", 32), ("layers", 1), ("layers", 2)}
    assert (tmp_path / "width.png").is_file() and (tmp_path / "layers.png").is_file()
    assert "slope over width" in said and "slope over layers" in said


GRID = ["--widths=16,32", "--rates=0.005,0.01,0.02", "--seeds=2", "--parametrisations=minicpm"]


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_repeats_nothing(small, tmp_path):
    code, _ = run("transfer", small, f"--run.directory={tmp_path / 'whole'}", *GRID)
    assert code in (0, 1)
    expected = read_csv(tmp_path / "whole" / "trials.csv")
    assert len(expected) == 2 * 3 * 2 * 3

    killed = tmp_path / "killed"
    ledger, kills = killed / "trials.jsonl", 0
    for wanted in (1, 4, 7):
        process = start("transfer", small, f"--run.directory={killed}", *GRID)
        while process.poll() is None:
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= wanted:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        process.communicate()
    assert kills >= 2
    before = ledger.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    code, said = run("transfer", small, f"--run.directory={killed}", *GRID)
    assert code in (0, 1), said
    assert ledger.read_bytes().startswith(before)  # what was finished was not touched
    lines = Lines.read(ledger)
    assert len({line["trial"] for line in lines}) == len(lines) == 12
    assert without_clock(read_csv(killed / "trials.csv")) == without_clock(expected)


def test_a_rate_that_diverges_is_a_row_and_not_a_crash(small, tmp_path):
    code, said = run(
        "transfer",
        small,
        f"--run.directory={tmp_path}",
        "--widths=16,32",
        "--rates=0.01,0.02,1e37",
        "--seeds=1",
        "--parametrisations=minicpm",
    )
    assert code in (0, 1)
    assert "2 of 6 trials diverged; the first one: loss or gradient not finite by step" in said
    rows = read_csv(tmp_path / "trials.csv")
    assert {row["learning_rate"] for row in rows if row["status"] == "diverged"} == {1e37}
    assert said.splitlines()[-1].startswith("verdict: ")


def test_a_trial_that_fails_fails_the_verdict_and_all_of_them_the_study(small, tmp_path, monkeypatch):
    measure, asked = transfer.measure, []

    def failing(bench, trial):
        asked.append(trial)
        if len(asked) == 1 or trial.config.run.seed == 7:
            raise MemoryError("no room")
        return measure(bench, trial)

    failing.__module__ = measure.__module__
    monkeypatch.setattr(transfer, "measure", failing)
    flags = ["transfer", small, f"--run.directory={tmp_path}", *GRID]
    code, said = run(*flags)
    assert code == 1 and "1 of 12 trials failed; the first one: MemoryError: no room" in said
    assert "every trial ran (1 of 12 failed, bar 0)" in said.splitlines()[-1]
    asked.append(None)
    code, said = run(*flags)
    assert "failed" not in said and len(asked) == 14  # the one that failed, and no other

    def hopeless(bench, trial):
        raise MemoryError("no room")

    monkeypatch.setattr(transfer, "measure", hopeless)
    code, said = run("transfer", small, f"--run.directory={tmp_path / 'other'}", *GRID)
    assert code == 2 and said.endswith("every trial failed; the first one said: MemoryError: no room")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "STUDY"),
        (["coordinat"], "'coordinat'"),
        (["coordinate-check", "--widths=64,100"], "--widths: 100: expected a width that divides into heads"),
        (["coordinate-check", "--widths=64"], "--widths = 64: expected at least two"),
        (["coordinate-check", "--layers=2"], "--layers = 2: expected at least two"),
        (["coordinate-check", "--widths=", "--layers="], "--widths, --layers: expected at least one"),
        (["coordinate-check", "--widths=64,wide"], "'64,wide'"),
        (["coordinate-check", "--width=64,128"], "unknown flag --width=64,128; expected one of --widths"),
        (["coordinate-check", "--model.widht=64"], "model.widht: no such key"),
        (["coordinate-check", "--seeds=0"], "'0'"),
        (["coordinate-check", "--parametrisations=minicmp"], "minicmp: expected some of minicpm, "),
        (["coordinate-check", "--parametrisations="], "at least one name"),
        (["coordinate-check", "nowhere.yaml"], "nowhere.yaml"),
        (["coordinate-check", "--optimizer.learning_rate=0"], "optimizer.learning_rate = 0"),
        (["transfer", "--rates=0,0.01,0.02"], "--rates = 0,0.01,0.02: expected positive learning rates, got 0"),
        (["transfer", "--rates=0.01,-1,nan"], "got -1"),
        (["transfer", "--rates=0.01,0.02"], "at least three"),
        (["transfer", "--rates=0.01,high"], "0.01,high: expected numbers"),
        (["transfer", "--weight-decay-modes=none"], "none: expected some of coupled, "),
        (["transfer", "--sizes=tunnel-9m,tunnel-10m"], "tunnel-10m: expected one of minicpm-2b, "),
        (["transfer", "--widths="], "--widths, --layers, --sizes"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, folder, tmp_path):
    keys = [f"--run.cache={folder / 'cache'}", f"--run.directory={tmp_path / 'study'}"] if arguments else []
    code, said = run(*arguments, *keys)
    assert code == 2 and message in said, said
    assert not (tmp_path / "study" / "trials.jsonl").exists()


def test_without_held_out_text_there_is_nothing_to_look_at(small, tmp_path):
    for name in ("coordinate-check", "transfer"):
        code, said = run(name, small, "--data.held_out=0", f"--run.directory={tmp_path}", "--widths=16,32")
        assert code == 2 and said.startswith("data.held_out = 0")


def test_a_directory_that_is_a_run_is_refused(small, tmp_path):
    (tmp_path / "config.yaml").write_text("# fingerprint: 0\n")
    code, said = run("transfer", small, f"--run.directory={tmp_path}", *GRID)
    assert code == 2 and "is a run; expected a directory of its own" in said


def test_where_a_study_goes_by_itself():
    arguments, config = study.parse(["transfer", str(FAMILY), "--model.layers", "3", "--seeds", "2"])
    assert config.run.directory == "runs/transfer" and config.model.layers == 3 and arguments.seeds == 2
    _, config = study.parse(["coordinate-check"])
    assert config.run.directory == "runs/coordinate-check" and config.model.width == 64
    _, config = study.parse(["coordinate-check", "--run.directory=elsewhere", "--run.seed", "4"])
    assert (config.run.directory, config.run.seed, config.model.width) == ("elsewhere", 4, 64)
    with pytest.raises(UserError, match=r"^no_such_file: "):
        study.parse(["coordinate-check", "no_such_file"])


def test_help(capsys):
    for arguments in (["--help"], ["coordinate-check", "--help"], ["transfer", "--help"]):
        with pytest.raises(SystemExit) as caught:
            study.main(arguments)
        assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--controls" in said and "--weight-decay-modes" in said and "coordinate-check" in said
