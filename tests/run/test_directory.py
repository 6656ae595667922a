"""The run directory: nothing half written, no line lost or doubled, nothing foreign touched, one writer at a time."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.run import directory as module
from cpmjax.run.cli import decode
from cpmjax.run.config import CheckpointConfig, ComputeConfig, Config, DataConfig, RunConfig, TrainingConfig
from cpmjax.run.directory import Lines, RunDirectory, json_line, write_atomically
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.optimizers import Lion
from cpmjax.run.schedule import WSD, Cosine
from cpmjax.run.sources import TextFolder

CONFIG = Config(run=RunConfig(seed=5), data=DataConfig(corpora={"docs": TextFolder("/t")}, stable={"docs": 1.0}))
REPOSITORY = Path(module.__file__).parents[2]


def change(**sections: Any) -> Config:
    return dataclasses.replace(CONFIG, **sections)


def accepting(*keys: str) -> RunConfig:
    return RunConfig(seed=5, accept_changes=keys)


def message_of(caught: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create(CONFIG, {"kind": "trained"})
    return run


# Whole files.


def test_write_atomically_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.partial").write_bytes(b"what a kill left")
    write_atomically(path, "é")
    assert path.read_bytes() == b"\xc3\xa9"
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path) and path.read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_line_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "metrics.jsonl")
    lines._file.close()
    lines._file = open("/dev/full", "wb", buffering=0)  # type: ignore[assignment]  # noqa: SIM115
    with pytest.raises(OSError) as caught:
        lines.append({"step": 1})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(lines.path)


# Lines.


def write_steps(path: Path, steps: range) -> None:
    lines = Lines(path)
    for step in steps:
        lines.append({"step": step})
    lines.close()


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in Lines.read(path)]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(), st.floats() | st.integers() | st.text() | st.none() | st.lists(st.floats(allow_nan=False))
    )
)
def test_records_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, record: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    lines = Lines(path)
    lines.append(record)
    lines.sync()
    lines.close()
    (read,) = Lines.read(path)
    assert read.keys() == record.keys()
    for key, value in record.items():
        if isinstance(value, float) and not math.isnan(value):
            assert struct.pack("d", read[key]) == struct.pack("d", value)
        else:
            assert read[key] == value or (math.isnan(value) and math.isnan(read[key]))


def test_text_is_there_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    records = [{"text": "你好 é🙂\u2028\u2029\u0085\x0b\x1c\n\r"}, {"text": "a\ud800b\udc80你"}]
    lines = Lines(path)
    for record in records:
        lines.append(record)
    lines.close()
    first, second, rest = path.read_bytes().split(b"\n")
    assert first.decode().startswith('{"text": "你好 é🙂\u2028\u2029\u0085') and rest == b""
    assert second.decode() == '{"text": "a\\ud800b\\udc80你"}'  # UTF-8 has no bytes for these two
    assert Lines.read(path) == records
    assert json_line(records[0], "ascii").isascii()
    assert [
        json.loads(json_line(record, encoding)) for encoding in ("ascii", "gbk") for record in records
    ] == records * 2


@pytest.mark.parametrize("torn", [b"{", b'{"step": 4', b'{"step": 4}', b"\x00" * 9, "é".encode()[:1]])
def test_a_torn_last_line_counts_as_not_written(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(torn)
    assert steps_in(path) == [1, 2, 3]
    write_steps(path, range(4, 6))
    assert steps_in(path) == [1, 2, 3, 4, 5]
    assert path.read_bytes().count(b"\n") == 5


@settings(deadline=None)
@given(cut=st.integers(0, 70), kept=st.integers(0, 7))
def test_killed_anywhere_and_resumed_no_line_is_lost_or_doubled(
    tmp_path_factory: pytest.TempPathFactory, cut: int, kept: int
) -> None:
    """A run of 6 steps is cut at any byte; it resumes from a checkpoint made no later than its last whole line."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    write_steps(path, range(1, 7))
    uninterrupted = path.read_bytes()
    path.write_bytes(uninterrupted[:cut])
    checkpoint = min(kept, len(Lines.read(path)))
    lines = Lines(path)
    lines.keep_until(checkpoint)
    for step in range(checkpoint + 1, 7):
        lines.append({"step": step})
    lines.close()
    assert path.read_bytes() == uninterrupted


def test_keep_until_leaves_kept_lines_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,  "loss": 2.50}\n{"step": 3}\n{"step": 2}\n')
    lines = Lines(path)
    lines.keep_until(2)
    lines.append({"step": 3})
    lines.close()
    assert path.read_bytes() == b'{"step":1,  "loss": 2.50}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("broken", [b"{\n", b"[1]\n", b"\n", b"\xff\n", b"7\n"])
def test_a_broken_line_is_named(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'{"step": 2}\n')
    with pytest.raises(UserError) as caught:
        Lines.read(path)
    assert f"{path}, line 2: expected a JSON object" in message_of(caught)


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys\nfrom cpmjax.run.directory import Lines\nlines = Lines(sys.argv[1])\nstep = 0\n"
        "while True:\n    step += 1\n    lines.append({'step': step, 'text': 'x' * 20000})\n    print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = steps_in(path)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= reported[-1]


# Creation.


def test_create(run: RunDirectory) -> None:
    assert run.exists and decode(run.read_config(), "config.yaml") == CONFIG
    provenance = run.provenance()
    assert provenance["kind"] == "trained" and provenance["seed"] == 5
    assert set(provenance["versions"]) == {"python", "jax", "flax", "optax", "orbax-checkpoint", "cpmjax"}
    assert provenance["versions"]["python"] == sys.version.split()[0] and provenance["command"]
    assert provenance["created"].endswith("+00:00")
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "provenance.json"]
    with pytest.raises(UserError, match="holds a run already"):
        run.create(CONFIG, {"kind": "trained"})


def test_a_kill_during_creation_leaves_something_to_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    writes = iter([write_atomically])

    def killed(path: Path, data: str) -> None:
        write = next(writes, None)
        if write is None:
            path.with_name(path.name + ".partial").write_text("half")
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", killed)
        with run.lock(), pytest.raises(KeyboardInterrupt):
            run.create(CONFIG, {"kind": "trained"})
    run.tokenizer_file.write_bytes(b"pieces")
    run.tokenizer_settings_file.with_name("tokenizer.json.partial").write_bytes(b"half")
    assert not run.exists and run.provenance_file.exists()
    run.refuse_foreign()
    run.create(CONFIG, {"kind": "trained"})
    assert run.exists and not run.config_file.with_name("config.yaml.partial").exists()


def test_foreign_places_are_refused_and_untouched(tmp_path: Path) -> None:
    file, folder, other, lost = (tmp_path / name for name in ("file", "folder", "other", "lost"))
    file.write_text("x")
    for directory in (folder, other, lost):
        directory.mkdir()
    (folder / "thesis.tex").write_text("x")
    (other / "config.yaml").write_text("model: {}\n")
    (lost / "checkpoints").mkdir()
    for path, found in ((file, "a file"), (folder, "thesis.tex"), (other, "fingerprint"), (lost, "checkpoints")):
        run = RunDirectory(path)
        before = sorted(tmp_path.rglob("*"))
        for act in (run.refuse_foreign, lambda run=run: run.create(CONFIG, {}), lambda run=run: run.lock().__enter__()):
            with pytest.raises(UserError) as caught:
                act()
            assert f"{path} is not a run directory" in message_of(caught) and found in message_of(caught)
        assert sorted(tmp_path.rglob("*")) == before


def test_new_and_empty_places_are_fine(tmp_path: Path, run: RunDirectory) -> None:
    for path in (tmp_path, tmp_path / "a" / "b", run.path):
        if path != tmp_path:
            RunDirectory(path).refuse_foreign()
    empty = tmp_path / "empty"
    empty.mkdir()
    RunDirectory(empty).refuse_foreign()
    assert not RunDirectory(empty).exists
    with pytest.raises(UserError, match=r"is not a run directory: there is no .*config.yaml"):
        RunDirectory(empty).read_config()


# Resuming.


def test_the_same_configuration_may_go_on(run: RunDirectory) -> None:
    before = run.config_file.read_bytes()
    elsewhere = change(run=RunConfig(seed=5, directory="/somewhere/else", cache="/cache"))
    assert run.check_resume(CONFIG) == run.check_resume(elsewhere) == {}
    assert run.config_file.read_bytes() == before and "changes" not in run.provenance()


def test_differences_are_listed_in_one_line_and_refused(run: RunDirectory) -> None:
    before = run.config_file.read_bytes()
    config = change(training=TrainingConfig(batch_size=8), checkpoint=CheckpointConfig(every=7, steps=(1,)))
    with pytest.raises(UserError) as caught:
        run.check_resume(config)
    message = message_of(caught)
    for part in (
        str(run.path),
        "training.batch_size: 16 -> 8",
        "checkpoint.every: 100 -> 7",
        "checkpoint.steps: [] -> [1]",
        "--run.accept_changes=[checkpoint.every,checkpoint.steps,training.batch_size]",
    ):
        assert part in message
    assert run.config_file.read_bytes() == before


@pytest.mark.parametrize("accept", [("checkpoint",), ("checkpoint.every",), ("model", "checkpoint.every")])
def test_accepted_differences_are_stored_and_noted(run: RunDirectory, accept: tuple[str, ...]) -> None:
    config = change(checkpoint=CheckpointConfig(every=7), run=accepting(*accept))
    assert run.check_resume(config) == {"checkpoint.every": (100, 7)}
    assert decode(run.read_config(), "config.yaml") == config
    (entry,) = run.provenance()["changes"]
    assert entry["keys"] == {"checkpoint.every": [100, 7]} and run.provenance()["kind"] == "trained"
    assert run.check_resume(config) == {}
    back = change(run=accepting("checkpoint"))
    assert run.check_resume(back) == {"checkpoint.every": (7, 100)}
    assert len(run.provenance()["changes"]) == 2


def test_a_name_accepts_itself_and_what_is_below_it(run: RunDirectory) -> None:
    tokenizer = dataclasses.replace(CONFIG.data.tokenizer, sample_bytes=9)
    data = dataclasses.replace(CONFIG.data, tokenizer=tokenizer)
    for refused in (accepting("data.token"), accepting("dat"), accepting("data.tokenizer.path"), accepting("model")):
        with pytest.raises(UserError, match=r"data\.tokenizer\.sample_bytes: 4000000 -> 9"):
            run.check_resume(change(data=data, run=refused))
    assert list(run.check_resume(change(data=data, run=accepting("data.tokenizer")))) == ["data.tokenizer.sample_bytes"]


def test_the_stores_that_a_run_began_with_are_forgotten_once_their_text_may_be_another(run: RunDirectory) -> None:
    run.write_provenance(run.provenance() | {"stores": {"a": "a-0"}})
    run.check_resume(change(checkpoint=CheckpointConfig(every=7), run=accepting("checkpoint")))
    assert run.provenance()["stores"] == {"a": "a-0"}
    data = dataclasses.replace(CONFIG.data, held_out=0.5)
    run.check_resume(change(data=data, run=accepting("checkpoint", "data")))
    assert "stores" not in run.provenance()


def test_a_key_that_is_younger_than_the_run_has_its_default_there(run: RunDirectory) -> None:
    text = run.config_file.read_text()
    older = text.replace("  layers_base: 8\n", "")
    assert older != text
    run.config_file.write_text(older)
    assert run.check_resume(CONFIG) == {}
    with pytest.raises(UserError, match=r"model\.layers_base: 8 -> 2"):
        run.check_resume(change(model=dataclasses.replace(CONFIG.model, layers_base=2)))


def test_a_run_from_before_some_keys_goes_on_as_it_was(run: RunDirectory) -> None:
    config = change(compute=ComputeConfig(remat="none"))  # its default then
    text = run.config_file.read_text().replace("  remat: dots\n", "  remat: none\n")
    older = text.replace("  type: adamw\n", "").replace("  state_dtype: float32\n", "")
    older = older.replace("  offload: false\n", "")
    older = older.replace("  ema: null\n", "").replace("      on_end: repeat\n", "").replace("  attention: auto\n", "")
    assert text.count("\n") == older.count("\n") + 6
    run.config_file.write_text(older)
    assert run.check_resume(config) == {}
    assert fingerprint(config) == "b6804a9356c9"  # as it was then
    assert fingerprint(change(optimizer=Lion())) != fingerprint(CONFIG)


def test_another_kind_of_schedule(run: RunDirectory) -> None:
    with pytest.raises(UserError) as caught:
        run.check_resume(change(schedule=Cosine()))
    assert 'schedule.type: "wsd" -> "cosine"' in message_of(caught)
    assert "schedule.stable: 900 -> null" in message_of(caught)
    assert run.check_resume(change(schedule=Cosine(), run=accepting("schedule")))["schedule.length"] == (None, 1000)


def test_a_kill_between_note_and_configuration_notes_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(schedule=WSD(decay=7), run=accepting("schedule"))

    def killed(path: Path, data: str) -> None:
        if path == run.config_file:
            raise KeyboardInterrupt
        write_atomically(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            run.check_resume(config)
    assert run.check_resume(config) == {"schedule.decay": (100, 7)}
    assert len(run.provenance()["changes"]) == 1


def test_a_lost_provenance_is_named(run: RunDirectory) -> None:
    run.provenance_file.write_text("{")
    with pytest.raises(UserError, match=r"provenance.json: expected a JSON object"):
        run.provenance()


# One writer.


def test_two_writers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    code = (
        "import sys\nfrom cpmjax.run.directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).lock():\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"locked\n"
    with pytest.raises(UserError) as caught, run.lock():
        pass
    assert f"{run.path}: another process" in message_of(caught)
    process.kill()
    process.communicate()
    with run.lock():
        run.create(CONFIG, {"kind": "trained"})
    with run.lock():
        assert json.loads(run.provenance_file.read_text())["kind"] == "trained"


def test_names_of_the_files(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    named = {name: path.name for name, path in vars(run).items() if name != "path"}
    assert named == {
        "config_file": "config.yaml",
        "tokenizer_file": "tokenizer.model",
        "tokenizer_settings_file": "tokenizer.json",
        "metrics_file": "metrics.jsonl",
        "samples_file": "samples.jsonl",
        "provenance_file": "provenance.json",
        "plots": "plots",
        "profile": "profile",
    }
    assert run.checkpoints == tmp_path / "checkpoints"


def test_checkpoints_lie_where_the_configuration_says(tmp_path: Path) -> None:
    run, folder = RunDirectory(tmp_path / "run"), "s3://bucket/run"
    run.create(change(checkpoint=CheckpointConfig(folder=folder)), {"kind": "trained"})
    assert str(RunDirectory(tmp_path / "run").checkpoints) == folder
    # The same experiment, wherever they lie; but a resume has to find them.
    assert fingerprint(change(checkpoint=CheckpointConfig(folder=folder))) == fingerprint(CONFIG)
    with pytest.raises(UserError, match=f'checkpoint.folder: "{folder}" -> null'):
        run.check_resume(CONFIG)
