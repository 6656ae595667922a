"""Exports are complete or absent: killed, refused, out of room, or failing half-way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from disks import Disk, small_disk
from formats.conversions import (
    GOLDEN,
    HISTORY,
    KEYS,
    command,
    converted,
    copy_history,
    finish,
    kill,
    left_in,
    refused,
    start,
)

from cpmjax.formats.loading import open_stored
from cpmjax.formats.safetensors_files import open_safetensors, write_safetensors
from cpmjax.formats.tensors import TensorInfo
from cpmjax.formats.torch_files import open_torch

MODEL = GOLDEN / "minicpm-tiny-gqa"
KINDS = ["hf", "llama", "gguf"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    converted(HISTORY, run, "--to=run", *KEYS)
    return run


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.name: file.read_bytes() for file in files}


def changed_since(began: int, path: Path) -> bool:
    try:
        return path.stat().st_ctime_ns >= began
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_during_an_export(kind, run, tmp_path):
    """There is no target until it is whole; what a kill leaves is hidden, and cleared by the next call."""
    whole, target, log = tmp_path / "whole" / "model", tmp_path / "killed" / "model", tmp_path / "log"
    converted(run, whole, f"--to={kind}")
    draw, kills, workplace = random.Random(2), 0, target.with_name(".model.partial")
    while kills < 4:
        began = time.time_ns()
        process = start(log, run, target, f"--to={kind}", pause=0.01)
        while not changed_since(began, workplace / "model") and process.is_alive():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.25))
        was_killed = kill(process)
        kills += was_killed
        if target.exists():  # the kill, if there was one, came after the renaming
            assert content(target) == content(whole), log.read_text()
            subprocess.run(["rm", "-r", target], check=True)
        else:
            assert was_killed and left_in(target.parent) == [workplace.name], log.read_text()
    converted(run, target, f"--to={kind}")
    assert left_in(target.parent) == ["model"]
    assert content(target) == content(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_that_is_taken(kind, tmp_path):
    target = tmp_path / "model"
    target.write_text("a year of work")
    assert refused(MODEL, target, f"--to={kind}") == f"{target}: exists already; expected a new place"
    assert target.read_text() == "a year of work"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert refused(MODEL, link, f"--to={kind}") == f"{link}: exists already; expected a new place"
    assert left_in(tmp_path) == ["link", "model"]


def test_folders_above_are_made_and_may_be_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    converted(MODEL, tmp_path / "link" / "a" / "b" / "model", "--to=hf")
    assert left_in(tmp_path / "disk" / "a" / "b") == ["model"]
    file = tmp_path / "file"
    file.write_text("no folder")
    message = refused(MODEL, file / "model", "--to=hf")
    assert str(file) in message and "Not a directory" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refused(MODEL, tmp_path / "closed" / "model", "--to=hf")


@pytest.mark.slow
def test_two_writers_of_one_target(run, tmp_path):
    target, log = tmp_path / "model.gguf", tmp_path / "log"
    first = start(log, run, target, "--to=gguf", pause=0.05)
    workplace = tmp_path / ".model.gguf.partial"
    while not (workplace / "model.gguf").exists() and first.is_alive():
        time.sleep(0.01)
    assert refused(run, target, "--to=gguf") == (
        f"{workplace}: another process is writing this target; expected to be alone"
    )
    assert finish(first) == 0, log.read_text()
    converted(run, tmp_path / "alone.gguf", "--to=gguf")
    assert open_stored(target).weights.dtypes == open_stored(tmp_path / "alone.gguf").weights.dtypes
    assert target.stat().st_size == (tmp_path / "alone.gguf").stat().st_size


@pytest.mark.slow
def test_several_steps_go_on_after_a_kill(run, tmp_path):
    target, log = tmp_path / "models", tmp_path / "log"
    first = start(log, run, target, "--to=gguf", "--steps=all", pause=0.01)
    while not (target / "300000.gguf").exists() and first.is_alive():
        time.sleep(0.005)
    assert kill(first)
    assert not (target / "390000.gguf").exists()
    before = (target / "300000.gguf").stat().st_mtime_ns
    stderr = converted(run, target, "--to=gguf", "--steps=all")
    assert f"step 300000 -> {target}/300000.gguf is there already" in stderr
    assert (target / "300000.gguf").stat().st_mtime_ns == before
    assert left_in(target) == ["300000.gguf", "390000.gguf"]
    converted(run, tmp_path / "alone.gguf", "--to=gguf", "--step=390000")
    ours, alone = (open_stored(path).weights for path in (target / "390000.gguf", tmp_path / "alone.gguf"))
    assert all(np.array_equal(ours.read(*each), alone.read(*each)) for each in ours.slices())


def test_a_bad_file_among_several_steps(tmp_path):
    source = copy_history(tmp_path / "source", step300000="pytorch_model.300000", step390000="pytorch_model.390000")
    (source / "pytorch_model.350000").write_bytes(b"<html>")
    code, stderr = command(source, tmp_path / "models", "--to=hf", "--steps=all")
    assert code == 1 and "Traceback" not in stderr
    assert f"pytorch_model.350000: NOT converted: {source}/pytorch_model.350000: begins with b'<html>'" in stderr
    assert stderr.splitlines()[-1] == "not converted, for the reasons above: pytorch_model.350000"
    assert left_in(tmp_path / "models") == ["300000", "390000"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_the_type_cannot_hold(kind, tmp_path):
    """It shows in the middle of the file: norms come after the matrices."""
    source = copy_history(tmp_path / "source")
    tensors = open_torch(HISTORY / "pytorch_model.300000")
    arrays = {name: tensors.read(name) for name in tensors}
    large = next(name for name in arrays if name.endswith("layers.1.mlp.down_proj.weight"))
    arrays[large] = np.full_like(arrays[large], ml_dtypes.bfloat16(1e30))
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in arrays.items()}
    write_safetensors(source / "model.safetensors", infos, arrays.values())
    message = refused(source, tmp_path / "model", f"--to={kind}", "--dtype=f16")
    assert "layers/down, layer 1: holds " in message
    assert left_in(tmp_path) == ["source"]


# An index is data: it names files in its own folder, and nothing is read or written elsewhere.


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "a/model.safetensors", "..", "", 7, None])
def test_an_index_that_leads_out_of_the_folder(place, tmp_path):
    source = copy_history(tmp_path / "source")
    for folder in (tmp_path, source):
        (folder / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes())
    (source / "model.safetensors").unlink()
    names = list(open_safetensors(MODEL / "model.safetensors"))
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    message = refused(source, tmp_path / "model", "--to=hf")
    assert message.startswith(f"{index}: ") and "expected the name of a file in the same folder" in message
    assert left_in(tmp_path) == ["model.safetensors", "source"]


def test_shards_that_are_missing_or_not_listed(tmp_path):
    source = copy_history(tmp_path / "source")
    names = list(open_safetensors(MODEL / "model.safetensors"))
    index = source / "model.safetensors.index.json"
    shard = "model-00001-of-00001.safetensors"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    assert f"lists files that are not there: {shard}" in refused(source, tmp_path / "model", "--to=hf")
    (source / shard).write_bytes((MODEL / "model.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], shard)}))
    assert f"{source}/{shard}: {names[0]} is not in {index.name}" in refused(source, tmp_path / "model", "--to=hf")
    assert left_in(tmp_path) == ["source"]


# A full disk.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system with room for half a model."""
    with small_disk(tmp_path / "disk", "600k") as found:
        yield found


@pytest.mark.parametrize("kind", [*KINDS, "run"])
def test_a_full_disk(kind, disk, run):
    source = HISTORY if kind == "run" else run
    message = refused(source, disk.path / "model", f"--to={kind}", *(KEYS if kind == "run" else []))
    assert "no space left on the disk" in message and str(disk.path) in message
    assert left_in(disk.path) == []
    # With room it goes on, by the same command.
    disk.resize("20m")
    converted(source, disk.path / "model", f"--to={kind}", *(KEYS if kind == "run" else []))
    assert left_in(disk.path) == ["model"]
