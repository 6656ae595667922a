"""python -m cpmjax.convert as a user meets it: its help, one line for every mistake, and training from what it made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
from formats.conversions import GOLDEN, HISTORY, KEYS, ROOT, converted, left_in, refused, run_with_average

from cpmjax.convert import main

MODEL = GOLDEN / "minicpm-tiny-gqa"
HELP = "expected what python -m cpmjax.convert --help says"


@pytest.mark.smoke
def test_exit_codes_and_streams_of_the_command_itself(tmp_path):
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cpmjax.convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(HISTORY, tmp_path / "run", "--to", "run", *KEYS)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == f"{tmp_path / 'run'}: 2 of 2 checkpoints imported"
    assert f"--to run {KEYS[0]}" in json.loads((tmp_path / "run" / "provenance.json").read_text())["command"]
    done = run(tmp_path / "nothing", tmp_path / "model", "--to", "hf")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/nothing: no such file or folder; expected weights, or hf://OWNER/REPO\n"


def test_help_shows_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    flags = ("--to", "--step", "--steps", "--average", "--dtype", "--quant", "--mup", "--text-start", "--inspect")
    words = ("run", "hf", "llama", "gguf", "bf16", "q8_0", "q4_0", "hf://OWNER/REPO[@REVISION]", "--section.key=value")
    for each in (*flags, *words, "12,1.4,256", "SOURCE", "TARGET", "exit code is 1"):
        assert each in shown, each
    assert max(map(len, shown.splitlines())) <= 120


# (arguments after the source, what the line begins with, what it says beside)
MISTAKES: dict[str, tuple[list[str], str, str]] = {
    "no --to": (["model"], "command line: --to is missing; ", HELP),
    "no target": (["--to=hf"], "command line: TARGET is missing; ", HELP),
    "unknown --to": (["model", "--to=onnx"], "command line: argument --to: invalid choice: 'onnx' (choose from ", HELP),
    "unknown type": (
        ["model", "--to=hf", "--dtype=f64"],
        "command line: argument --dtype: invalid choice: 'f64'",
        HELP,
    ),
    "unknown flag": (["model", "--to=hf", "--quantt=q8_0"], "command line: unknown argument --quantt=q8_0; ", HELP),
    "third path": (["model", "more", "--to=hf"], "command line: unknown argument more; ", HELP),
    "key in two words": (
        ["model", "--to=run", "--training.batch_size", "8"],
        "command line: unknown argument --training.batch_size; ",
        HELP,
    ),
    "both": (["model", "--to=hf", "--step=1", "--steps=2"], "command line: --step and --steps are two answers", HELP),
    "steps in words": (
        ["model", "--to=hf", "--steps=one"],
        "command line: argument --steps: expected different numbers with commas between them, or all, got 'one'; ",
        HELP,
    ),
    "step in words": (["model", "--to=hf", "--step=last"], "command line: argument --step: invalid int", HELP),
    "two numbers": (
        ["model", "--to=hf", "--mup=12,1.4"],
        "command line: argument --mup: expected three numbers, as in 12,1.4,256, got '12,1.4'; ",
        HELP,
    ),
    "words for numbers": (
        ["model", "--to=hf", "--mup=a,b,c"],
        "command line: argument --mup: expected three numb",
        HELP,
    ),
    "not positive": (
        ["model", "--to=hf", "--mup=0,1,1"],
        "command line: argument --mup: expected three positive",
        HELP,
    ),
    "nan": (["model", "--to=hf", "--mup=nan,1,1"], "command line: argument --mup: expected three positive", HELP),
    "--quant of a run": (["model", "--to=run", "--quant=q8_0"], "--quant q8_0: expected --to gguf with it", ""),
    "--quant with --dtype": (
        ["model", "--to=gguf", "--quant=q8_0", "--dtype=f16"],
        "--quant q8_0 and --dtype f16: expected one of them",
        "",
    ),
    "keys of a file": (["model", "--to=hf", KEYS[0]], f"{KEYS[0]}: expected --to run with it", ""),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_for_a_mistake_in_the_command(mistake, tmp_path, monkeypatch):
    arguments, begins, says = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    message = refused(HISTORY, *arguments)
    assert message.startswith(begins) and says in message
    assert len(message) < 200
    assert left_in(tmp_path) == []


def test_no_source():
    assert refused() == f"command line: the following arguments are required: source; {HELP}"


def test_steps_that_the_source_does_not_have(tmp_path):
    target = tmp_path / "model"
    listed = "expected one of 300000, 390000"
    assert refused(HISTORY, target, "--to=hf", "--step=7") == f"{HISTORY}: has no step 7; {listed}"
    assert refused(HISTORY, target, "--to=run", "--steps=7", *KEYS) == f"{HISTORY}: has no step 7; {listed}"
    # A file of one model takes one of them.
    assert refused(HISTORY, target, "--to=hf") == (
        f"{HISTORY}: a series of checkpoints; expected --step, one of 300000, 390000, or --steps all"
    )
    single = f"{MODEL}: holds one model; expected no steps, or --to run and the --step it gets"
    for flag in ("--steps=all", "--step=1", "--steps=1,2"):
        assert refused(MODEL, target, "--to=hf", flag) == single
    assert refused(MODEL, target, "--to=run", "--steps=1,2") == single
    assert left_in(tmp_path) == []


def test_the_average_of_a_run(tmp_path):
    run, target = run_with_average(tmp_path / "run"), tmp_path / "model"
    converted(run, target, "--to=hf", "--average")
    converted(HISTORY, tmp_path / "expected", "--to=hf", "--step=300000")
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes()
    message = refused(run, tmp_path / "all", "--to=hf", "--average", "--steps=all")
    assert message.startswith(f"{run}/checkpoints/300000 has no average: expected one of a run with training.ema")
    assert refused(run, tmp_path / "all", "--to=hf", "--average", "--steps=400000,300000") == message
    assert refused(MODEL, tmp_path / "all", "--to=hf", "--average") == f"--average: expected a run, got {MODEL}"
    assert left_in(tmp_path) == ["expected", "model", "run"]


def test_keys_that_are_wrong_are_wrong_for_the_whole_series(tmp_path):
    target = tmp_path / "run"
    assert "(nearest: schedule)" in refused(HISTORY, target, "--to=run", "--schedul.type=wsd")
    assert "schedule.half_lif: no such key" in refused(HISTORY, target, "--to=run", *KEYS, "--schedule.half_lif=7")
    message = refused(HISTORY, target, "--to=run", "--schedule.type=wsd")
    assert message == (
        f"{HISTORY}: --schedule.type=wsd alone says too little; expected "
        "--optimizer.learning_rate, --training.batch_size, --data.sequence_length too"
    )
    assert "training.batch_size = 'many': expected a whole number" in (
        refused(HISTORY, target, "--to=run", *KEYS, "--training.batch_size=many")
    )
    assert left_in(tmp_path) == []


def test_the_schedule_is_asked_for_where_it_is_not_known(tmp_path):
    stderr = converted(HISTORY, tmp_path / "run", "--to=run")
    [line] = [line for line in stderr.splitlines() if "not known" in line]
    assert all(f"--{key}" in line for key in ("schedule", "optimizer.learning_rate", "training.batch_size"))


# Training from what was imported.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = jobs.shared_folder(tmp_path_factory)
    (folder / "english").mkdir()
    for number, paragraph in enumerate((ROOT / "LICENSE").read_text().split("\n\n")):
        (folder / "english" / f"{number:03}.txt").write_text(paragraph)
    converted(HISTORY, folder / "dated", "--to=run", *KEYS)
    converted(MODEL, folder / "unknown", "--to=run", "--step=300000")
    converted(HISTORY, folder / "undated", "--to=run")
    return folder


def decay(folder: Path, parent: Path, step: int, name: str) -> tuple[str | Path, ...]:
    """The arguments of three steps of decay on English."""
    corpora = {"english": {"type": "text", "path": str(folder / "english")}}
    experiment = folder / f"{name}.yaml"
    experiment.write_text(
        json.dumps(
            {
                "run": {"directory": str(folder / name), "cache": str(folder / "cache")},
                "branch": {"run": str(parent), "step": step},
                "data": {"corpora": corpora, "stable": {"english": 1.0}, "sequence_length": 32, "held_out": 0.1},
                "schedule": {"decay": 3},
                "training": {"batch_size": 4},
                "evaluation": {"every": 3, "rows": 4},
                "log": {"tensorboard": False},
            }
        )
    )
    return (experiment,)


@pytest.mark.slow
def test_a_branch_of_a_stable_checkpoint(folder):
    stderr = jobs.train(*decay(folder, folder / "dated", 300_000, "decayed"))
    assert "at step 300000, fresh moments, rate warmed up again over 100 steps" in stderr
    records = jobs.records(folder / "decayed")
    assert [(record["step"], record["stage"]) for record in records] == [
        (300_001, "decay"),
        (300_002, "decay"),
        (300_003, "decay"),
    ]
    # Half-life and peak are the parent's; the rate rises again to them in a hundred steps.
    rates = [0.01 * 0.5 ** (done / 15_000) * done / 100 for done in (1, 2, 3)]
    assert [record["learning_rate"] for record in records] == pytest.approx(rates, rel=1e-5)
    # The weights are those of a model that was trained on English; one that knows nothing has ln 503 = 6.2.
    assert records[0]["loss"] < 4.5
    assert (folder / "decayed" / "tokenizer.model").read_bytes() == (HISTORY / "tokenizer.model").read_bytes()
    assert jobs.steps_of(folder / "decayed")[-1] == 300_003


@pytest.mark.slow
def test_a_branch_of_a_checkpoint_of_unknown_stage(folder):
    """Whoever branches there knows."""
    stderr = jobs.train(*decay(folder, folder / "undated", 390_000, "decayed_all_the_same"))
    assert "at step 390000, fresh moments" in stderr
    assert [record["stage"] for record in jobs.records(folder / "decayed_all_the_same")] == ["decay"] * 3


def test_what_cannot_be_trained_on(folder):
    message = jobs.refusal(*decay(folder, folder / "dated", 390_000, "refused"))
    assert message == (
        f"branch.step = 390000 of {folder / 'dated'} is in the stage decay; expected a stable checkpoint: 300000"
    )
    # No tokenizer came with the weights.
    message = jobs.refusal(*decay(folder, folder / "unknown", 300_000, "refused"))
    assert f"{folder / 'unknown' / 'tokenizer.model'}: No such file" in message
    message = jobs.refusal(f"--branch.run={folder / 'dated'}", "--branch.step=300000", f"--run.directory={folder}/no")
    assert message == "data.corpora = {}: expected at least one corpus"
    assert jobs.refusal(folder / "dated" / "config.yaml") == "data.corpora = {}: expected at least one corpus"
    assert not (folder / "refused" / "config.yaml").exists()
