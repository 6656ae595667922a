"""Shards and their index: as transformers and the safetensors library have them, and indices that are not true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch_by_hand import state, tensor, write

from cpmjax.formats.safetensors_files import open_safetensors, write_safetensors
from cpmjax.formats.shards import INDEX, open_sharded, write_sharded
from cpmjax.formats.tensors import TensorInfo
from cpmjax.run.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "minicpm-tiny-gqa" / "model.safetensors"


@pytest.fixture(scope="module")
def real():
    return open_safetensors(GOLDEN)


def write_all(folder, tensors, max_shard_bytes):
    write_sharded(folder, tensors, (tensors.read(name) for name in tensors), max_shard_bytes)


@pytest.mark.smoke
def test_what_is_written_is_what_is_read(tmp_path, real):
    write_all(tmp_path, real, max_shard_bytes=500_000)
    read = open_sharded(tmp_path / INDEX)
    assert dict(read) == dict(real) and list(read) == list(real)
    assert all(read.read(name).tobytes() == real.read(name).tobytes() for name in real)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) >= 3
    sizes = [sum(shard.read(name).nbytes for name in shard) for shard in map(open_safetensors, tmp_path.glob("*-of-*"))]
    assert max(sizes) <= 500_000
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": sum(sizes)}


def test_what_fits_into_one_file_is_one(tmp_path, real):
    write_all(tmp_path, real, max_shard_bytes=5_000_000_000)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert dict(open_safetensors(tmp_path / "model.safetensors")) == dict(real)


def test_a_tensor_larger_than_a_shard_has_one_to_itself(tmp_path):
    infos = {
        name: TensorInfo((size,), np.dtype(np.int8), "I8") for name, size in zip("abcd", (4, 20, 5, 5), strict=True)
    }
    write_sharded(tmp_path, infos, (np.zeros(info.shape, np.int8) for info in infos.values()), max_shard_bytes=10)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert [file[6:11] for file in weight_map.values()] == ["00001", "00002", "00003", "00003"]


@pytest.mark.parametrize("change", [-1, 1])
def test_one_array_more_or_less(tmp_path, real, change):
    arrays = [real.read(name) for name in real]
    with pytest.raises(ValueError, match=r"longer|shorter"):
        write_sharded(tmp_path, real, arrays[:change] if change < 0 else [*arrays, arrays[0]], 500_000)


def test_transformers_finds_the_shards_of_the_index(tmp_path, real):
    hub = pytest.importorskip("transformers.utils.hub")
    write_all(tmp_path, real, max_shard_bytes=500_000)
    files, metadata = hub.get_checkpoint_shard_files(str(tmp_path), str(tmp_path / INDEX))
    assert sorted(files) == sorted(map(str, tmp_path.glob("*-of-*")))
    assert sorted(metadata["all_checkpoint_keys"]) == sorted(real)


def two_shards(folder, **changes):
    """Two files with `a` and `b` in them, and an index with these changes in its weight_map."""
    info = TensorInfo((2,), np.dtype(np.float32), "F32")
    for name in "ab":
        write_safetensors(folder / f"{name}.safetensors", {name: info}, [np.zeros(2, np.float32)])
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"} | changes
    content = {"metadata": {}, "weight_map": {name: file for name, file in weight_map.items() if file}}
    (folder / INDEX).write_text(json.dumps(content))
    return folder / INDEX


def refused(index, *words):
    with pytest.raises(UserError) as caught:
        open_sharded(index)
    message = str(caught.value)
    assert str(index.parent) in message and "; expected " in message and message.isprintable(), message
    assert all(word in message.replace(str(index.parent), "") for word in words), message


@pytest.mark.parametrize(
    "file",
    ["../a.safetensors", "/etc/a.safetensors", "sub/a.safetensors", "..", ".", "a.gguf", "a.py", 7, ["a.safetensors"]],
)
def test_files_that_are_no_shards_beside_the_index(tmp_path, file):
    (tmp_path / "sub").mkdir()
    two_shards(tmp_path / "sub")
    refused(two_shards(tmp_path, c=file), "'c' is in", "same folder")


def test_all_missing_files_are_named(tmp_path):
    index = two_shards(tmp_path, c="c.safetensors", d="d\n.bin")
    (tmp_path / "a.safetensors").unlink()
    refused(index, "a.safetensors", "c.safetensors", "d\\n.bin")


def test_index_and_files_agree(tmp_path):
    assert list(open_sharded(two_shards(tmp_path))) == ["a", "b"]
    refused(two_shards(tmp_path, c="a.safetensors"), "a.safetensors: 'c' is not in it")
    info = TensorInfo((2,), np.dtype(np.float32), "F32")
    index = two_shards(tmp_path)
    write_safetensors(tmp_path / "b.safetensors", {"b": info, "x": info}, [np.zeros(2, np.float32)] * 2)
    refused(index, "b.safetensors: x is not in model.safetensors.index.json")


def test_torch_files_are_shards_too(tmp_path):
    write(tmp_path, state(tensor())).rename(tmp_path / "pytorch_model-00001-of-00001.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}))
    assert open_sharded(index).read("w").tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff", b"[" * 100_000, b"1" * 10_000],
)
def test_other_files(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content)
    refused(tmp_path / INDEX, "weight_map")
    refused(tmp_path / "absent.index.json", "No such file")
