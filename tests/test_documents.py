"""Every YAML in experiments/ loads and runs, and every command of the README works as printed (fewer steps)."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_series import small_series

from cpmjax import study
from cpmjax.model.presets import PRESETS
from cpmjax.run import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)

# What makes the default run a matter of seconds; nothing else of it is changed.
SHORT = ["--schedule.warmup=2", "--schedule.decay=2", "--evaluation.every=4", "--evaluation.rows=8"]
TRUNK = ["--schedule.stable=4", "--checkpoint.every=2"]


def commands() -> list[str]:
    """The commands of the README's shell blocks, continued lines joined, without comments."""
    text = "\n".join(body for language, body in BLOCKS if language == "bash").replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def train(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpmjax.train", *arguments, f"--run.cache={folder / 'cache'}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the experiments in it, and the default run, shortened."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    result = train(["experiments/wsd.yaml", *SHORT, *TRUNK], folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.smoke
def test_the_default_run(folder):
    run = folder / "runs" / "wsd"
    for name in ("config.yaml", "tokenizer.model", "metrics.jsonl", "samples.jsonl", "provenance.json"):
        assert (run / name).is_file(), name
    assert (run / "plots" / "loss.png").stat().st_size > 10_000
    assert (run / "checkpoints" / "8" / "parameters").is_dir()


@pytest.mark.slow
def test_the_decay_experiment(folder):
    result = train(["experiments/decay.yaml", "--branch.step=4", *SHORT[1:]], folder)
    assert result.returncode == 0, result.stderr
    assert "a branch of" in result.stderr


EXPERIMENTS = [path for path in sorted((ROOT / "experiments").rglob("*.yaml")) if path.parent.name != "launch"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_says_what_it_shows_and_loads(path):
    text = path.read_text()
    assert text.startswith("# "), "an experiment opens with what it shows"
    if "branch:" not in text:
        config = cli.load([str(path)], PRESETS, "")
        assert cli.load([str(path), f"--run.seed={config.run.seed}"], PRESETS, "") == config


def test_the_readme_has_its_two_commands():
    install = [command for command in commands() if "pip install" in command]
    assert len(install) == 2
    assert all("python3 -m venv" in command for command in install)
    assert "cpmjax.train experiments/wsd.yaml" in install[0] and "pytest" in install[1]


@pytest.mark.slow
def test_every_training_command_of_the_readme(folder):
    """In the order of the README: each finds what the ones before it made."""
    (folder / "my_text").mkdir()
    for number, path in enumerate(sorted([*ROOT.glob("cpmjax/**/*.py"), *ROOT.glob("tests/**/*.py")])):
        (folder / "my_text" / f"{number}.txt").write_text(path.read_text() or "empty")
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if "cpmjax.train" not in words or "pip" in words:
            continue
        arguments = words[words.index("cpmjax.train") + 1 :]
        if "--help" not in arguments:
            arguments = [re.sub(r"(branch\.step=)\d+", r"\g<1>4", argument) for argument in arguments]
            arguments = [argument for argument in arguments if not argument.startswith("--schedule.decay=")]
            if "experiments/decay.yaml" in arguments:
                arguments.append("--branch.step=4")
            branch = any("branch" in argument or "decay.yaml" in argument for argument in arguments)
            arguments += SHORT[1:] if branch else [*SHORT, *TRUNK]
        result = train(arguments, folder)
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        ran += 1
    assert ran >= 3


@pytest.mark.slow
def test_every_conversion_of_the_readme(folder):
    """In the order of the README: each finds what the ones before it made."""
    (folder / "tests").symlink_to(ROOT / "tests")
    conversions = [shlex.split(command) for command in commands() if "cpmjax.convert" in command]
    assert len(conversions) >= 5
    for words in conversions:
        command = [sys.executable, *words[1:]]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr}"
    assert (folder / "runs" / "from_gguf" / "checkpoints" / "0").is_dir()


@pytest.mark.slow
def test_every_sampling_command_of_the_readme(folder):
    words = [shlex.split(command) for command in commands()]
    (printf,) = [each for each in words if each[0] == "printf"]
    assert printf[2:] == [">", "prompts.txt"]
    (folder / "prompts.txt").write_text(printf[1].replace("\\n", "\n"))
    sampling = [each[1:] for each in words if "cpmjax.sample" in each]
    assert len(sampling) == 2
    for arguments in sampling:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, input="")
        assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stderr}"
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_every_plan_of_the_readme(folder):
    plans = [shlex.split(command) for command in commands() if "cpmjax.plan" in command]
    assert len(plans) == 2
    for words in plans:
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert re.search(r"^FLOPs +\d", done.stdout, re.MULTILINE)


@pytest.mark.slow
def test_every_study_of_the_readme_and_of_the_family(folder):
    """Fewer and smaller trials; what such a short study finds is not asked, but it must come to a verdict."""
    text = (ROOT / "experiments" / "tunnel" / "family.yaml").read_text()
    listed = [*commands(), *re.findall(r"^#\s+(python -m cpmjax\.study .*?)(?:  .*)?$", text, re.MULTILINE)]
    studies = [shlex.split(command) for command in listed if re.search("cpmjax.study (coordinate|transfer)", command)]
    assert len(studies) >= 6
    # Of the two largest models a step of a few tokens: they are there for their names.
    few = ["--data.sequence_length=32", "--training.batch_size=1", "--evaluation.rows=2"]
    small = ["--seeds=1", *SHORT[:2], "--schedule.stable=4", *few]
    check = [*small, "--widths=32,64", "--layers="]
    grid = [*small, "--rates=0.005,0.01,0.02", "--parametrisations=minicpm"]
    for words in studies:
        arguments = words[words.index("cpmjax.study") + 1 :]
        arguments += check if "coordinate-check" in words else grid
        if arguments[0] == "transfer" and not {"--layers", "--sizes"} & set(words):
            arguments.append("--widths=32,64")
        command = [sys.executable, "-m", "cpmjax.study", *arguments, f"--run.cache={folder / 'cache'}"]
        command = [re.sub(r"^tunnel-9m,.*", "tunnel-9m,tunnel-30m", word) for word in command]
        command = [re.sub(r"^2,4,8,16$", "1,2", word) for word in command]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode in (0, 1) and done.stdout.splitlines()[-1].startswith("verdict: "), done.stderr


def test_every_study_that_is_named_somewhere_is_a_command(monkeypatch):
    """With its flags and keys, in the README, and in the headers of experiments and the openings of notebooks."""
    monkeypatch.chdir(ROOT)
    texts = [file.read_text() for file in (ROOT / "experiments").rglob("*.yaml")]
    cells = [cell for file in (ROOT / "notebooks").glob("*.ipynb") for cell in json.loads(file.read_text())["cells"]]
    texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    joined = [re.sub(r" *\\\n#? *", " ", text) for text in texts]
    listed = [*commands(), *(line for text in joined for line in text.splitlines())]
    found = [re.search(r"^#?\s*[\w./]*python -m cpmjax\.study (.*?)(?:  .*)?$", line) for line in listed]
    studies = [shlex.split(match[1]) for match in found if match]
    assert len(studies) > 12
    for words in studies:
        study.parse(words)


@pytest.mark.slow
def test_the_series_of_the_readme_and_its_atlas(folder, tmp_path_factory):
    """The series itself is made small (`small_series`); the atlas is that of the README."""
    found = [shlex.split(command)[3:] for command in commands() if re.search("cpmjax.study (series|atlas)", command)]
    assert found == [["series", "experiments/study.yaml"], ["atlas", "runs/study/decay20"]]
    (folder / "runs" / "study").symlink_to(small_series(tmp_path_factory))
    command = [sys.executable, "-m", "cpmjax.study", "atlas", "runs/study/decay20", "--directory=runs/atlas"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "runs/atlas/atlas.csv" in done.stdout, done.stderr


def test_every_python_block_of_the_readme(folder):
    for language, body in BLOCKS:
        if language == "python":
            result = subprocess.run([sys.executable, "-c", body], cwd=folder, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr


def test_the_layout_in_the_readme_is_the_layout():
    layout = next(body for language, body in BLOCKS if language == "text" and body.startswith("cpmjax/"))
    named = set(re.findall(r"^  (\w+/|\w+\.py)", layout, re.MULTILINE))
    there = {path.name + "/" for path in (ROOT / "cpmjax").iterdir() if path.is_dir() and path.name != "__pycache__"}
    there |= {path.name for path in (ROOT / "cpmjax").glob("*.py")} - {"__init__.py"}
    assert named == there


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
