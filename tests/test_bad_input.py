"""What a user can do wrong ends with one line and exit code 2, and stops no corrected start."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from disks import Disk, small_disk

pytestmark = pytest.mark.slow

SHORT = {"warmup": 1, "stable": 1, "decay": 1}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


def folder_of_texts(folder: Path) -> Path:
    return jobs.write_corpus(folder / "texts", seed=7)


def jsonl(folder: Path) -> Path:
    """The same documents as lines of one file."""
    texts = folder_of_texts(folder)
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text.read_text()}) + "\n" for text in sorted(texts.iterdir())))
    return file


def replace_line(file: Path, number: int, line: bytes) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line + b"\n"
    file.write_bytes(b"".join(lines))


def write_bad_text(name: str, content: bytes) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        texts = folder_of_texts(folder)
        (texts / name).write_bytes(content)
        return texts

    return spoil


def write_bad_line(line: bytes) -> Callable[[Path], Path]:
    def spoil(folder: Path) -> Path:
        file = jsonl(folder)
        replace_line(file, 3, line)
        return file

    return spoil


def truncated_gzip(folder: Path) -> Path:
    file = folder / "texts.jsonl.gz"
    whole = gzip.compress(jsonl(folder).read_bytes())
    file.write_bytes(whole[: len(whole) // 2])
    return file


def parquet_of_something_else(folder: Path) -> Path:
    file = folder / "texts.parquet"
    pq.write_table(pa.table({"content": ["a", "b"]}), file)
    return file


def dangling_link(folder: Path) -> Path:
    texts = folder_of_texts(folder)
    (texts / "bad.txt").symlink_to(texts / "nowhere")
    return texts


def without_permission(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    texts = write_bad_text("bad.txt", b"text")(folder)
    (texts / "bad.txt").chmod(0)
    return texts


# What is wrong with a corpus -> (how it comes about, what the message must name).
BAD_DOCUMENTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "empty file": (write_bad_text("bad.txt", b" \n"), ("bad.txt: empty", "expected text")),
    "not UTF-8": (write_bad_text("bad.txt", b"caf\xe9 au lait"), ("bad.txt, byte 3: 0xe9", "expected UTF-8 text")),
    "unreadable": (dangling_link, ("bad.txt: No such file", "expected a readable file")),
    "forbidden": (without_permission, ("bad.txt: Permission denied", "expected a readable file")),
    "malformed line": (write_bad_line(b'{"text": "cut sho'), ("texts.jsonl, line 3: not JSON", "'text' is a string")),
    "no object": (write_bad_line(b'["text"]'), ("texts.jsonl, line 3: a JSON list", "'text' is a string")),
    "missing field": (write_bad_line(b'{"txt": "a"}'), ("line 3: no 'text', the nearest key is 'txt'", "a string")),
    "field of another type": (write_bad_line(b'{"text": 5}'), ("line 3: its 'text' is a int", "a string")),
    "truncated gzip": (truncated_gzip, (".jsonl.gz, line ", "the gzip data stops", "expected a complete file")),
    "missing column": (parquet_of_something_else, (".parquet: no 'text', the nearest key is 'content'", "is a string")),
    "bytes in a line": (write_bad_line(b'{"text": "\xff"}'), ("texts.jsonl, line 3, byte", "0xff is not UTF-8")),
}


def spoilt(folder: Path, path: Path, **sections: jobs.Tree) -> Path:
    """An experiment of three steps on one corpus."""
    kind = {".jsonl": "jsonl", ".gz": "jsonl", ".parquet": "parquet"}.get(path.suffix, "text")
    corpus = {"type": kind, "path": str(path)}
    data = {"corpora": {"texts": corpus}, "stable": {"texts": 1.0}, "decay": {}} | sections.pop("data", {})
    return jobs.experiment(folder, "run", schedule=SHORT, data=data, **sections)


@pytest.mark.parametrize("fault", BAD_DOCUMENTS)
def test_bad_document_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    spoil, expected = BAD_DOCUMENTS[fault]
    path = spoil(tmp_path)
    message = jobs.refusal(spoilt(tmp_path, path))
    assert message.startswith(str(path))
    for words in expected:
        assert words in message
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_bad_documents_are_skipped_and_counted_and_mending_them_is_enough(tmp_path: Path, shared: Path) -> None:
    file = jsonl(tmp_path)
    good = file.read_bytes()
    replace_line(file, 3, b"{")
    replace_line(file, 5, b'{"txt": "a"}')
    replace_line(file, 7, b'{"text": "\xff"}')
    experiment = spoilt(tmp_path, file, run={"directory": str(tmp_path / "run"), "cache": str(shared / "cache")})
    stderr = jobs.train(experiment, f"--run.directory={tmp_path / 'skipping'}", "--data.bad_documents=skip")
    sizes = re.search(
        r"corpus texts: (\d+) documents, .*; (\d+) documents held out; .*; 3 bad documents skipped", stderr
    )
    assert sizes and sum(map(int, sizes.groups())) == 40 - 3
    (store,) = (shared / "cache" / "tokens").glob("texts-*/store.json")
    skipped = json.loads(store.read_text())["skipped"]
    assert skipped == {"malformed JSON": 1, "missing field": 1, "not UTF-8": 1}

    assert "line 3" in jobs.refusal(experiment)
    file.write_bytes(good)
    jobs.train(experiment)
    assert [record["step"] for record in jobs.records(tmp_path / "run")] == [1, 2, 3]


def test_corpora_that_are_missing_or_too_small(tmp_path: Path) -> None:
    texts = folder_of_texts(tmp_path)
    message = jobs.refusal(spoilt(tmp_path, tmp_path / "nowhere"))
    assert message == f"{tmp_path / 'nowhere'}: no such file or folder; expected the documents of a corpus there"
    message = jobs.refusal(spoilt(tmp_path, texts, data={"sequence_length": 10**6}))
    assert message.startswith("corpus texts (train): ") and "expected at least the 1000001 of one row" in message
    message = jobs.refusal(spoilt(tmp_path, texts, data={"held_out": 1e-9}))
    assert message.startswith("corpus texts (held_out): 0 documents") and "raise data.held_out" in message
    message = jobs.refusal(spoilt(tmp_path, texts, model={"vocabulary": 100_000}))
    assert "vocabulary" in message and "100000" in message.replace(",", "")
    message = jobs.refusal(spoilt(tmp_path, texts, data={"stable": {"text": 1.0}}))
    assert message == "data.stable.text = 1.0: expected one of data.corpora: texts"


def test_a_store_that_does_not_answer(tmp_path: Path) -> None:
    corpus = {"type": "jsonl", "path": "http://127.0.0.1:1/texts.jsonl"}
    data = {"corpora": {"texts": corpus}, "bad_documents": "skip"}
    message = jobs.refusal(spoilt(tmp_path, folder_of_texts(tmp_path), data=data))
    assert message.startswith(f"{corpus['path']}: ") and message.endswith("; expected a store that answers")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not list(tmp_path.glob("cache/tokens/texts-*"))


def test_a_batch_larger_than_the_corpus(tmp_path: Path) -> None:
    """Its rows would be the same ones several times over in each step."""
    texts = tmp_path / "texts"
    jobs.write_corpus(texts, seed=7, documents=10)
    message = jobs.refusal(spoilt(tmp_path, texts, training={"batch_size": 4096}))
    assert re.fullmatch(
        r"corpus texts: \d{3} rows of 32 tokens; expected at least the 4096 that a batch takes of it: "
        r"add text, or lower training.batch_size = 4096",
        message,
    )


def test_a_directory_that_is_something_else(tmp_path: Path) -> None:
    experiment = spoilt(tmp_path, folder_of_texts(tmp_path))
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("a year of work")
    message = jobs.refusal(experiment, f"--run.directory={foreign}")
    assert message == f"{foreign} is not a run directory: it has chapter1.tex, but no config.yaml"
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]

    file = tmp_path / "file"
    file.write_text("text")
    assert jobs.refusal(experiment, f"--run.directory={file}") == f"{file} is not a run directory: it is a file"
    (foreign / "config.yaml").write_text("title: thesis\n")
    assert "its config.yaml has no fingerprint" in jobs.refusal(experiment, f"--run.directory={foreign}")
    assert (foreign / "config.yaml").read_text() == "title: thesis\n"


def test_unknown_keys_and_values(tmp_path: Path) -> None:
    experiment = spoilt(tmp_path, folder_of_texts(tmp_path))
    message = jobs.refusal(experiment, "--optimizer.learning_rat=1")
    assert "optimizer.learning_rat: no such key" in message and "(nearest: learning_rate)" in message
    assert "expected a number" in jobs.refusal(experiment, "--optimizer.learning_rate=fast")
    assert "no_such.yaml: No such file" in jobs.refusal(tmp_path / "no_such.yaml")
    experiment.write_text(experiment.read_text().replace("stable: 1\n", "stabel: 1\n"))
    message = jobs.refusal(experiment)
    assert message.startswith(f"{experiment}: schedule.stabel: no such key") and "(nearest: stable)" in message
    assert not (tmp_path / "run").exists()


# A loss that is not finite.


def test_loss_that_is_not_finite(shared: Path) -> None:
    run = shared / "explodes"
    experiment = jobs.experiment(shared, run.name, schedule={"stable": 1, "decay": 1})
    jobs.train(experiment)
    # From step 8 on at a rate of 1e10: that step's loss is still one of sound parameters, the next one's is not.
    changes = ("--optimizer.learning_rate=1e10", "--schedule.stable=20", "--run.accept_changes=[optimizer,schedule]")
    message = jobs.error_line(*jobs.finish(jobs.start(experiment, *changes)))
    assert message == (
        f"{run}: loss nan and gradient norm nan at step 9, rows 32 to 35; expected finite numbers, with at most "
        f"training.skip_nonfinite = 0 exceptions; last good checkpoint: {run / 'checkpoints' / '7'}"
    )
    assert [record["step"] for record in jobs.records(run)] == list(range(1, 9))
    assert jobs.steps_of(run)[-1] == 7

    # Told to skip, it goes on from there: the steps are counted and change nothing.
    skip = ("--training.skip_nonfinite=3", "--run.accept_changes=[optimizer,schedule,training]")
    message = jobs.error_line(*jobs.finish(jobs.start(experiment, *changes[:2], *skip)))
    assert "at step 12, rows 44 to 47" in message and "training.skip_nonfinite = 3 exceptions" in message
    assert [record["skipped"] for record in jobs.records(run)] == [0.0] * 8 + [1.0, 2.0, 3.0]
    assert np.isnan([record["loss"] for record in jobs.records(run)[8:]]).all()
    assert f"last good checkpoint: {run / 'checkpoints' / '10'}" in message
    arrays = jobs.checkpoint_arrays(run, 10)
    assert arrays and all(np.isfinite(array).all() for array in arrays.values())

    # The count is part of the state: a restart goes on with it.
    jobs.train(experiment, *changes[:2], "--training.skip_nonfinite=100", skip[1])
    assert [record["skipped"] for record in jobs.records(run)] == [0.0] * 8 + list(range(1, 27 - 8))
    assert jobs.steps_of(run)[-1] == 26


# A full disk.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own, whose size the test sets."""
    with small_disk(tmp_path / "disk", "1m") as found:
        yield found


def test_full_disk_under_the_run(shared: Path, disk: Disk) -> None:
    experiment = jobs.experiment(shared, "roomy")
    jobs.train(experiment)
    expected = jobs.outcome(shared / "roomy")
    size = sum(path.stat().st_blocks * 512 for path in (shared / "roomy").rglob("*") if path.is_file())

    run = disk.path / "run"
    arguments = (experiment, f"--run.directory={run}")
    steps: list[int] = []
    for room, created in ((8192, False), (size // 2, True)):
        disk.resize(room)
        message = jobs.error_line(*jobs.finish(jobs.start(*arguments)))
        assert "no space left on the disk" in message and str(disk.path) in message
        assert (run / "config.yaml").exists() == created
        if created:
            assert jobs.unequal(jobs.outcome(run), expected, finished=False) == []
            steps = jobs.steps_of(run)
    assert steps and steps[-1] < 32

    disk.resize(64 * size)
    jobs.train(*arguments)
    assert jobs.unequal(jobs.outcome(run), expected) == []


def test_checkpoints_on_a_disk_that_turns_read_only_or_away(shared: Path, disk: Disk) -> None:
    """Their folder is on a disk of its own; the run goes on once that is back."""
    experiment = jobs.experiment(shared, "elsewhere")
    jobs.train(experiment)
    expected = jobs.outcome(shared / "elsewhere")
    disk.resize(2**26)
    folder, away = disk.path / "checkpoints", disk.path / "away"
    run = shared / "on_a_disk"
    arguments = (experiment, f"--run.directory={run}", f"--checkpoint.folder={folder}")

    def bring_back() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # what was being written just then may have made it again
        away.rename(folder)

    failures: list[tuple[int, Callable[[], object], Callable[[], object], str]] = [
        (5, lambda: disk.remount("ro"), lambda: disk.remount("rw"), "Read-only file system"),
        (15, lambda: folder.rename(away), bring_back, "the folder is gone"),
    ]
    for step, fail, mend, reason in failures:
        process = jobs.start(*arguments)
        try:
            assert jobs.signal_at(process, lambda step=step: (folder / str(step)).exists(), signal.SIGSTOP)
            fail()
        finally:
            process.send_signal(signal.SIGCONT)
        message = jobs.error_line(*jobs.finish(process))
        assert message.startswith(f"{folder}: a checkpoint was not written: ") and reason in message
        assert "; complete ones: " in message
        mend()
        assert step in [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
        assert jobs.unequal(jobs.outcome(run), expected, finished=False) == []
    jobs.train(*arguments)
    assert jobs.unequal(jobs.outcome(run), expected) == []


def test_full_disk_under_the_cache(shared: Path, disk: Disk) -> None:
    arguments = (jobs.experiment(shared, "cached", schedule=SHORT), f"--run.cache={disk.path / 'cache'}")
    for room in (4096, 40960):  # too small for the tokenizer, for the tokens
        disk.resize(room)
        message = jobs.refusal(*arguments)
        assert str(disk.path) in message and ("no space left" in message.lower())
        assert not (shared / "cached" / "config.yaml").exists()
    disk.resize(2**26)
    jobs.train(*arguments)
    assert len(jobs.records(shared / "cached")) == 3
