"""The bilingual experiment: on a folder of its layout with made-up text in it, and on the real one where it is."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.run.sources import Chat, Jsonl

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
REAL = ROOT.parent / "shared" / "data"
CONFIG = cli.load([str(EXPERIMENTS / "zh_en.yaml")], PRESETS, "")
DECAY_ALONE = CONFIG.data.decay.keys() - CONFIG.data.stable.keys()

SHORT = ["--schedule.decay=2", "--evaluation.every=3", "--evaluation.rows=2", "--evaluation.prompts=[天]"]
TRUNK = ["--schedule.warmup=2", "--schedule.stable=4", "--checkpoint.every=3"]


def write_layout(folder: Path) -> None:
    """Every file that the experiment names: 100 lines of words, or of characters where its name says zh."""
    for name, corpus in CONFIG.data.corpora.items():
        if not isinstance(corpus, Jsonl | Chat):
            continue
        draw = random.Random(name)
        letters, space = ("天地玄黄宇宙洪荒日月盈昃辰宿列张", "") if "zh" in corpus.path else ("abcdefghij", " ")
        words = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(30)]
        lines = []
        for _ in range(100):
            text = space.join(draw.choices(words, k=30))
            chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            lines.append({"messages": chat} if isinstance(corpus, Chat) else {"text": text, "source": name})
        file = folder / corpus.path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def check_trunk_and_control(folder: Path, work: Path, *changes: str) -> None:
    """Both runs end, and every evaluation has the held-out loss of every corpus, whichever stage reads it."""
    trunk, control = work / "trunk", work / "control"
    shared = [*SHORT, f"--run.cache={work / 'cache'}"]
    jobs.train(
        EXPERIMENTS / "zh_en.yaml", *shared, *TRUNK, *changes, f"--data.folder={folder}", f"--run.directory={trunk}"
    )
    branch = [f"--branch.run={trunk}", "--branch.step=6", f"--run.directory={control}"]
    said = jobs.train(EXPERIMENTS / "zh_en_control.yaml", *shared, *branch)
    (decay,) = [line for line in said.splitlines() if line.startswith("rows 48 to 64 (decay)")]
    assert not [name for name in DECAY_ALONE if f"% {name}," in decay] and "% code," in decay
    names = {f"{kind}/{name}" for kind in ("heldout", "bits_per_byte") for name in CONFIG.data.corpora}
    for run, steps in ((trunk, [3, 6, 8]), (control, [8])):
        evaluated = [record for record in jobs.records(run) if "heldout_loss" in record]
        assert [record["step"] for record in evaluated] == steps
        assert all(names <= record.keys() for record in evaluated)


def test_its_decay_adds_to_its_stable_mixture_and_the_control_takes_that_away():
    assert CONFIG.data.stable.keys() < CONFIG.data.decay.keys() == CONFIG.data.corpora.keys()
    assert sum(CONFIG.data.stable.values()) == sum(CONFIG.data.decay.values()) == 100
    control = cli.read_yaml(EXPERIMENTS / "zh_en_control.yaml")
    assert control["data"]["decay"] == CONFIG.data.stable | dict.fromkeys(DECAY_ALONE, 0)
    assert control["schedule"]["decay"] == CONFIG.schedule.decay
    assert control["branch"]["step"] == CONFIG.schedule.warmup + CONFIG.schedule.stable


@pytest.mark.slow
def test_it_runs_on_a_folder_of_its_layout(tmp_path):
    (tmp_path / "texts").mkdir()
    write_layout(tmp_path / "texts")
    check_trunk_and_control(tmp_path / "texts", tmp_path, "--model.vocabulary=600")
    # The benchmark of its tokenizer, counted again here.
    script = [sys.executable, EXPERIMENTS / "benchmarks" / "bytes_per_token.py", tmp_path / "trunk" / "config.yaml"]
    command = [*map(str, script), "--tokenizers", str(tmp_path / "trunk")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    found = {line["name"].partition(" (")[0]: line["sample"] for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == CONFIG.data.corpora.keys()
    stores = (tmp_path / "cache" / "tokens").glob("zh_prose-*/store.json")
    summary = json.loads(next(stores).read_text())["held_out"]
    assert found["zh_prose"] == pytest.approx(summary["bytes"] / (summary["tokens"] - 2 * summary["documents"]))
    assert Tokenizer.load(tmp_path / "trunk").vocabulary == 600


@pytest.mark.slow
def test_it_runs_on_the_real_folder(tmp_path):
    if not REAL.is_dir():
        pytest.skip(f"needs {REAL}")
    check_trunk_and_control(REAL, tmp_path)
