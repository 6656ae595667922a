"""The hub as a source: one file at a time is downloaded, converted and deleted; the result is that of the folder."""

from __future__ import annotations

import builtins
import contextlib
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
from formats.conversions import (
    GOLDEN,
    HISTORY,
    KEYS,
    SHARED,
    command,
    converted,
    copy_history,
    finish,
    kill,
    left_in,
    needs_shared,
    outcome,
    refused,
    start,
)
from formats.hub_server import HubServer, serve

from cpmjax.formats import hub
from cpmjax.formats.exporting import export_huggingface
from cpmjax.formats.loading import open_stored

pytest.importorskip("huggingface_hub")

REPO = "openbmb/MiniCPM-2B-history"
URL = f"hf://{REPO}"
FIRST, SECOND = "pytorch_model.300000", "pytorch_model.390000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_history(tmp_path_factory.mktemp("hub") / "two", step300000=FIRST, step390000=SECOND)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the same files give from a folder."""
    run = tmp_path_factory.mktemp("whole") / "run"
    converted(folder, run, "--to=run", *KEYS)
    return outcome(run)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_WAIT", 0.0)
    with serve(folder, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


class Watch(threading.Thread):
    """Looks all the time at how many weight files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.looks, self._stop_now = folder, 0, 0, False

    def run(self) -> None:
        while not self._stop_now:
            with contextlib.suppress(FileNotFoundError):  # a folder that was there a moment ago
                found = {path.name for path in self.folder.rglob("pytorch_model.*")}
                self.most = max(self.most, len(found))
                self.looks += bool(found)
            time.sleep(0.0005)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now = True
        self.join()


def test_the_run_is_that_of_the_folder(server, whole, tmp_path):
    run = tmp_path / "runs" / "history"
    with Watch(tmp_path) as watch:
        converted(URL, run, "--to=run", *KEYS)
    assert outcome(run) == whole
    assert watch.looks and watch.most == 1
    assert left_in(tmp_path / "runs") == ["history"]
    assert f'"source": "{URL}@{server.commit}"' in (run / "provenance.json").read_text()
    # What is there already is not downloaded again.
    before = len(server.downloads(FIRST))
    assert "is imported already" in converted(URL, run, "--to=run", *KEYS)
    assert len(server.downloads(FIRST)) == before == 1


@needs_shared
def test_all_six_are_downloaded_once_each(tmp_path, monkeypatch):
    source = SHARED / "minicpm-tiny-history"
    with serve(source, REPO) as server, Watch(tmp_path) as watch:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        converted(URL, tmp_path / "run", "--to=run", *KEYS)
    assert watch.most == 1
    converted(source, tmp_path / "other", "--to=run", *KEYS)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "other")
    names = [path.name for path in source.glob("pytorch_model.*")]
    assert len(names) == 6 and all(len(server.downloads(name)) == 1 for name in names)


def test_connections_that_break(server, whole, tmp_path):
    server.break_after(FIRST, 300_000, times=2)
    server.break_after(SECOND, 0, times=1)
    converted(URL, tmp_path / "run", "--to=run", *KEYS)
    assert outcome(tmp_path / "run") == whole
    assert [request.range for request in server.downloads(FIRST)] == ["bytes=0-", "bytes=300000-", "bytes=600000-"]


@pytest.mark.parametrize("fault", ["corrupt", "refused", "cut short"])
def test_a_bad_file_is_named_and_the_rest_imported(fault, server, whole, tmp_path):
    match fault:
        case "corrupt":
            server.corrupt(FIRST)
        case "refused":
            server.refuse(403, name=FIRST)
        case "cut short":
            server.truncate(FIRST, 1000)
    code, stderr = command(URL, tmp_path / "run", "--to=run", *KEYS)
    assert code == 1 and "Traceback" not in stderr
    assert f"step 300000: NOT imported: {URL}/{FIRST}: " in stderr
    assert stderr.splitlines()[-1] == f"not converted, for the reasons above: {FIRST}"
    assert jobs.steps_of(tmp_path / "run") == [390_000]
    server.behave()
    converted(URL, tmp_path / "run", "--to=run", *KEYS)
    assert outcome(tmp_path / "run") == whole
    assert left_in(tmp_path) == ["run"]


def test_a_network_that_goes_away_ends_the_import(server, whole, tmp_path):
    """Another file would bring nothing either, and what came of the first would be deleted for it."""
    server.break_after(FIRST, 0, times=hub._FAILURES)
    server._breaks[FIRST].append(500_000)  # the first answer
    assert f"{URL}/{FIRST}: nothing more came after 500000 of 1107203 bytes" in (
        refused(URL, tmp_path / "run", "--to=run", *KEYS)
    )
    assert left_in(tmp_path) == [".run.download"] and server.downloads(SECOND) == []
    assert [path.name for path in (tmp_path / ".run.download").rglob("*") if path.is_file()] == [".lock", FIRST]
    converted(URL, tmp_path / "run", "--to=run", *KEYS)
    assert server.downloads(FIRST)[-1].range == "bytes=500000-"
    assert outcome(tmp_path / "run") == whole
    assert left_in(tmp_path) == ["run"]


def test_another_commit_is_another_source(server, folder, tmp_path):
    converted(URL, tmp_path / "run", "--to=run", "--step=300000", *KEYS)
    before = server.commit
    server.push(folder)
    message = refused(URL, tmp_path / "run", "--to=run", *KEYS)
    assert f"holds an import of {URL}@{before} already" in message and f"{URL}@{server.commit}" in message
    server.push(folder.parent)
    converted(f"{URL}@{before}", tmp_path / "run", "--to=run", *KEYS)
    assert jobs.steps_of(tmp_path / "run") == [300_000, 390_000]


@pytest.mark.slow
def test_two_processes_do_not_share_a_download(server, whole, tmp_path):
    log, download = tmp_path / "log", tmp_path / ".run.download"
    server.slow(FIRST, 2e6)
    first = start(log, URL, tmp_path / "run", "--to=run", *KEYS, HF_ENDPOINT=server.endpoint)
    while not [*download.rglob(FIRST)] and first.is_alive():
        time.sleep(0.01)
    assert refused(URL, tmp_path / "run", "--to=run", *KEYS) == (
        f"{download}: another process is writing this download; expected to be alone"
    )
    assert finish(first) == 0, log.read_text()
    assert outcome(tmp_path / "run") == whole


@pytest.mark.slow
def test_killed_while_downloading(server, whole, tmp_path):
    """The same command goes on, from the byte where the last one was."""
    draw, log, run = random.Random(4), tmp_path / "log", tmp_path / "run"
    for name in (FIRST, SECOND):
        server.slow(name, 1e6)
    arguments = (URL, run, "--to=run", *KEYS)
    for _ in range(6):
        asked = len(server.downloads(FIRST)) + len(server.downloads(SECOND))
        process = start(log, *arguments, HF_ENDPOINT=server.endpoint)
        while len(server.downloads(FIRST)) + len(server.downloads(SECOND)) == asked and process.is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.05, 0.3))
        assert kill(process), log.read_text()
    server.behave()
    converted(*arguments)
    assert outcome(run) == whole
    assert left_in(tmp_path) == ["log", "run"]
    starts = [int(request.range.removeprefix("bytes=").removesuffix("-")) for request in server.downloads(FIRST)]
    assert starts == sorted(starts) and starts[-1] > 100_000


# One model.


@pytest.mark.parametrize("kind", ["hf", "gguf", "run"])
def test_a_repository_of_one_model(kind, tmp_path, monkeypatch):
    model = GOLDEN / "minicpm-tiny-gqa"
    with serve(model, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        converted(URL, tmp_path / "model", f"--to={kind}")
    assert left_in(tmp_path) == ["model"]
    ours, theirs = open_stored(tmp_path / "model").weights, open_stored(model).weights
    assert ours.config == theirs.config or kind == "gguf"
    for each in theirs.slices():
        assert (ours.read(*each).astype("f4") == theirs.read(*each).astype("f4")).all()


def test_a_repository_in_shards(tmp_path, monkeypatch):
    """The index is a small file of the repository, and belongs to the weights."""
    served = tmp_path / "served"
    stored = open_stored(GOLDEN / "minicpm-tiny-gqa")
    export_huggingface(stored, served, shard_bytes=400_000)
    assert (served / "model.safetensors.index.json").exists()
    with serve(served, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        converted(URL, tmp_path / "model", "--to=hf")
    assert left_in(tmp_path) == ["model", "served"]
    ours = open_stored(tmp_path / "model").weights
    assert all((ours.read(*each) == stored.weights.read(*each)).all() for each in ours.slices())


def test_folders_of_a_repository_with_configs_of_their_own(tmp_path, monkeypatch, whole):
    served = tmp_path / "served"
    copy_history(served, step300000="step_300000/pytorch_model.bin", step390000="step_390000/pytorch_model.bin")
    for step in ("step_300000", "step_390000"):
        shutil.copy(HISTORY / "config.json", served / step)
    (served / "config.json").unlink()
    with serve(served, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        converted(URL, tmp_path / "run", "--to=run", *KEYS)
    assert outcome(tmp_path / "run")["checkpoints"] == whole["checkpoints"]
    assert left_in(tmp_path) == ["run", "served"]


def test_a_repository_without_weights(tmp_path, monkeypatch):
    served = copy_history(tmp_path / "served")
    with serve(served, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        assert refused(URL, tmp_path / "model", "--to=hf") == (
            f"{URL}: holds no weights; expected model.safetensors, pytorch_model.bin or their index"
        )
    assert left_in(tmp_path) == ["served"]


def test_without_the_library(server, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    assert refused(URL, tmp_path / "run", "--to=run") == (
        f"{URL}: the Hugging Face hub needs huggingface_hub: pip install cpmjax[hub]"
    )
    assert left_in(tmp_path) == []
