"""Checkpoints and corpora on an object store: a local server that speaks S3, with all that a local folder promises."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jobs
import numpy as np
import pytest
from etils import epath

import cpmjax
from cpmjax.checkpoint import object_stores
from cpmjax.checkpoint.store import Checkpoints, refuse_used
from cpmjax.model.parameters import flat, specs
from cpmjax.model.weights import Weights
from cpmjax.run.config import CheckpointConfig, ModelConfig
from cpmjax.run.errors import Unreachable, UserError

s3fs = pytest.importorskip("s3fs", reason="needs s3fs, which talks to S3")
moto = pytest.importorskip("moto.server", reason="needs moto[server], which is S3 here")

BUCKET = "cpmjax-tests"
POSITION = {"sequences": 2**40 + 1, "skipped": 3}
METADATA = {"step": 7, "tokens": 1234, "stage": "stable", "learning_rate": 0.1 + 0.2}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Its address; what it holds is in memory."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line a request
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def point_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """As a user does: by the environment, which the jobs that a test starts have too."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    s3fs.S3FileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def folder(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a folder that nothing is in."""
    point_to(monkeypatch, server)
    system = s3fs.S3FileSystem(use_listings_cache=False)
    if not system.exists(BUCKET):
        system.mkdir(BUCKET)
    yield f"s3://{BUCKET}/{request.node.name.partition('[')[0]}"
    s3fs.S3FileSystem.clear_instance_cache()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def objects(folder: str) -> list[str]:
    system = s3fs.S3FileSystem(use_listings_cache=False)
    return [path.removeprefix(folder.removeprefix("s3://") + "/") for path in system.find(folder)]


def values(seed: int, rows: int = 64) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    matrix = random.integers(0, 2**32, (rows, 64), np.uint32).view(np.float32)
    return {"embedding": matrix, "layers": {"gate": random.normal(size=(3, 8, 16)).astype(np.float32)}}


def save(store: Checkpoints, step: int, rows: int = 64) -> None:
    tree = jax.tree.map(jax.device_put, values(step, rows))
    store.save(step, tree, {"mu": tree}, POSITION, METADATA | {"step": step})


def assert_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_is_restored_is_what_was_saved(folder):
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        for step in (3, 7):
            save(store, step)
        store.wait()
        assert store.newest() == f"{folder}/7"
    with contextlib.closing(Checkpoints(folder)) as store:
        assert store.steps() == [3, 7]
        for step in (3, 7):
            assert_bits(store.parameters(step), values(step))
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), store.parameters(step)
            )
            assert_bits(store.optimizer(step, {"mu": shapes}), {"mu": values(step)})
            assert store.position(step) == POSITION
            assert store.metadata(step) == METADATA | {"step": step}
            assert not store.has_average(step)
        with pytest.raises(UserError, match=r"no checkpoint of step 5: expected one of 3, 7"):
            store.parameters(5)
    with pytest.raises(UserError, match=f"has no checkpoints: expected a folder {folder}/none"):
        Checkpoints(f"{folder}/none")


@pytest.mark.parametrize(
    "rules, kept", [(CheckpointConfig(keep_last=2), [4, 5]), (CheckpointConfig(keep_last=1, steps=(2,)), [2, 5])]
)
def test_keep_rules(folder, rules, kept):
    place = f"{folder}/{kept[0]}"
    with contextlib.closing(Checkpoints(place, rules)) as store:
        for step in range(1, 6):
            save(store, step)
        store.wait()
        assert store.steps() == kept
    assert {int(name.partition("/")[0]) for name in objects(place)} == set(kept)


def test_a_model_is_written_and_read_slice_by_slice(folder):
    config = ModelConfig(vocabulary=64, width=16, layers=3, heads=2, feed_forward=32, dim_model_base=16)
    draw = np.random.default_rng(0)
    arrays = {path: draw.normal(size=spec.shape).astype(np.float32) for path, spec in flat(specs(config)).items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        return arrays[path] if layer is None else arrays[path][layer]

    weights = Weights(config, {path: array.dtype for path, array in arrays.items()}, read)
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        store.save_weights(5, weights, METADATA)
        found = store.weights(5, config)
        for path, layer in found.slices():
            assert found.read(path, layer).tobytes() == read(path, layer).tobytes()
        assert_bits(flat(store.parameters(5)), arrays)


def test_a_step_without_its_mark_is_no_checkpoint_and_whoever_writes_next_removes_it(folder):
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        for step in (1, 2):
            save(store, step)
    s3fs.S3FileSystem().rm_file(f"{folder}/2/commit_success.txt")
    with contextlib.closing(Checkpoints(folder)) as store:
        assert store.steps() == [1]
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        save(store, 3)
        store.wait()
        assert store.steps() == [1, 3]
    assert {name.partition("/")[0] for name in objects(folder)} == {"1", "3"}


def test_a_deletion_that_stops_halfway_leaves_no_checkpoint(folder, monkeypatch):
    """A store deletes objects in any order: what says that a step is complete has to go before all others."""
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        for step in (1, 2):
            save(store, step)
        store.wait()

        delete = s3fs.S3FileSystem._bulk_delete

        async def all_of_one_only(self: Any, names: list[str], **kwargs: Any) -> list[str]:
            if len(names) > 1:
                raise OSError("the machine is gone")
            return await delete(self, names, **kwargs)

        monkeypatch.setattr(s3fs.S3FileSystem, "_bulk_delete", all_of_one_only)
        with pytest.raises(OSError, match="is gone"):
            store.delete(1)
    assert any(name.startswith("1/parameters/") for name in objects(folder))
    with contextlib.closing(Checkpoints(folder)) as store:
        assert store.steps() == [2]


def save_and_die(folder: str, step: str, milliseconds: str) -> None:
    """Dies so many milliseconds after an asynchronous save began, with nothing tidied up."""
    store = Checkpoints(folder, CheckpointConfig())
    save(store, int(step), rows=2**15)  # 8 MB an array
    time.sleep(int(milliseconds) / 1000)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_death_during_a_save_leaves_a_complete_checkpoint_or_none(folder):
    present = []
    for step, milliseconds in enumerate((5000, 0, 100), 1):
        code = "import sys, test_object_stores as test; test.save_and_die(*sys.argv[1:])"
        search = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        done = subprocess.run(
            [sys.executable, "-c", code, folder, str(step), str(milliseconds)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        with contextlib.closing(Checkpoints(folder)) as store:
            present.append(step in store.steps())
            for complete in store.steps():
                assert_bits(store.parameters(complete), values(complete, 2**15))
    assert present[0] and not present[1], present


# What cannot be used.


def test_a_folder_that_is_used_is_refused(folder):
    refuse_used(CheckpointConfig(folder=folder))
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        save(store, 1)
    with pytest.raises(UserError) as caught:
        refuse_used(CheckpointConfig(folder=folder))
    assert str(caught.value) == f"checkpoint.folder = {folder}: holds 1 already; expected a folder of this run alone"


def test_a_bucket_that_does_not_exist_is_not_made(folder):
    url = "s3://cpmjax-typo/run"
    for attempt in (lambda: refuse_used(CheckpointConfig(folder=url)), lambda: Checkpoints(url, CheckpointConfig())):
        with pytest.raises(UserError, match=f"{url}: there is no bucket cpmjax-typo; expected one that exists"):
            attempt()
    assert not s3fs.S3FileSystem(use_listings_cache=False).exists("cpmjax-typo")


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # imported once already
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    with pytest.raises(UserError, match=r"expected the package s3fs: pip install s3fs"):
        Checkpoints(folder, CheckpointConfig())


def test_a_store_that_stops_answering_is_one_error(monkeypatch):
    """In the middle of a run: arrays go through tensorstore, whose own patience would last half an hour."""
    monkeypatch.setattr(object_stores, "_RETRIES", 1)
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    point_to(monkeypatch, f"http://{host}:{port}")
    if not (system := s3fs.S3FileSystem(use_listings_cache=False)).exists(BUCKET):
        system.mkdir(BUCKET)
    store = Checkpoints(f"s3://{BUCKET}/stops", CheckpointConfig())
    save(store, 1)
    store.wait()
    running.stop()
    with pytest.raises(UserError) as caught:
        save(store, 2)
        store.wait()
    message = str(caught.value)
    assert message.startswith(f"s3://{BUCKET}/stops: a checkpoint was not written: ") and "\n" not in message
    assert message.endswith("; expected a store that answers; complete ones: none that can be seen")
    with contextlib.suppress(UserError):
        store.close()
    with pytest.raises(Unreachable, match="expected an object store that answers"):
        Checkpoints(f"s3://{BUCKET}/stops")


# What users do: a job whose checkpoints are there, and whatever reads a run.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


@pytest.mark.slow
def test_a_job_is_killed_during_a_save_and_goes_on(shared, folder):
    """Bit-equal to a run whose checkpoints are on this machine; and another run branches from it."""
    local = jobs.experiment(shared, "on_this_machine")
    jobs.train(local)
    expected = jobs.outcome(shared / "on_this_machine")
    run = shared / "on_a_store"
    arguments = (local, f"--run.directory={run}", f"--checkpoint.folder={folder}")
    process = jobs.start(*arguments)
    system = s3fs.S3FileSystem(use_listings_cache=False)
    begun = f"{folder}/10/_CHECKPOINT_METADATA"
    assert jobs.signal_at(process, lambda: system.exists(begun), signal.SIGKILL), jobs.finish(process)
    jobs.finish(process)
    assert jobs.unequal(jobs.outcome(run), expected, finished=False) == []
    jobs.train(*arguments)
    assert jobs.unequal(jobs.outcome(run), expected) == []
    assert not (run / "checkpoints").exists()

    assert cpmjax.load(run).config == cpmjax.load(shared / "on_this_machine").config
    branch = (f"--branch.run={run}", "--branch.step=15", f"--run.directory={shared / 'from_a_store'}")
    assert jobs.refusal(local, *branch, f"--checkpoint.folder={folder}").startswith(
        f"checkpoint.folder = {folder}: holds 10 already"
    )
    jobs.train(local, *branch, f"--checkpoint.folder={folder}-branch")
    assert Checkpoints(f"{folder}-branch").steps()[-1] == jobs.records(shared / "from_a_store")[-1]["step"]
    # A resume looks where the checkpoints are; it does not begin again beside them.
    refused = jobs.refusal(local, f"--run.directory={run}")
    assert f'checkpoint.folder: "{folder}" -> null' in refused


@pytest.mark.slow
def test_a_corpus_is_read_from_a_store(shared, folder, tmp_path):
    local = jobs.experiment(shared, "text_of_this_machine", schedule={"warmup": 1, "stable": 1, "decay": 1})
    jobs.train(local)
    system = s3fs.S3FileSystem()
    for name in ("words", "others"):
        system.put(str(shared / name), f"{folder}/{name}", recursive=True)
    run = shared / "text_of_a_store"
    elsewhere = [f"--data.corpora.{name}.path={folder}/{name}" for name in ("words", "others")]
    jobs.train(local, f"--run.directory={run}", f"--run.cache={tmp_path}", *elsewhere)
    assert jobs.records(run) == jobs.records(shared / "text_of_this_machine")
