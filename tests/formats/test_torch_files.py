"""Files of torch.save against torch itself, of either layout, and old ones that are damaged."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from torch_by_hand import (
    FLOATS,
    MAGIC,
    PROTOCOL,
    SIZE,
    SYSTEM,
    counts,
    equal,
    old,
    old_state,
    old_tensor,
    refused,
    state,
    text,
    write,
)

from cpmjax.formats.safetensors_files import open_safetensors
from cpmjax.formats.torch_files import open_torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "torch"
SHARED = ROOT.parent / "shared" / "golden"
FILES = ["zip", "zip_protocol4", "legacy", "legacy_protocol4"]

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the larger golden files are not beside the project")


@pytest.mark.smoke
@pytest.mark.parametrize("file", FILES)
def test_what_torch_wrote(file):
    tensors, expected = open_torch(GOLDEN / f"{file}.bin"), open_safetensors(GOLDEN / "expected.safetensors")
    assert tensors.keys() == expected.keys()
    for name, info in tensors.items():
        read = tensors.read(name)
        assert equal(read, expected.read(name)), name
        assert (info.shape, info.dtype) == (read.shape, read.dtype)
        assert not read.flags.writeable and not read.flags.owndata
    assert {name: tensors[name].stored for name in ("bfloat16", "int64", "bool")} == {
        "bfloat16": "torch.bfloat16",
        "int64": "torch.int64",
        "bool": "torch.bool",
    }
    assert tensors["bfloat16"].dtype == ml_dtypes.bfloat16
    assert np.shares_memory(tensors.read("tied"), tensors.read("whole"))
    with pytest.raises(KeyError):
        tensors.read("absent")


@needs_shared
def test_tiny_a_has_the_weights_of_its_safetensors_file():
    tensors = open_torch(SHARED / "minicpm-tiny-a" / "pytorch_model.bin")
    expected = open_safetensors(SHARED / "minicpm-tiny-a" / "model.safetensors")
    assert tensors.keys() == expected.keys() | {"lm_head.weight"}
    assert all(equal(tensors.read(name), expected.read(name)) for name in expected)
    assert np.shares_memory(tensors.read("lm_head.weight"), tensors.read("model.embed_tokens.weight"))


@needs_shared
def test_history_is_as_torch_reads_it():
    torch = pytest.importorskip("torch")
    file = SHARED / "minicpm-tiny-history" / "pytorch_model.120000"
    tensors, expected = open_torch(file), torch.load(file)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].stored == "torch.bfloat16"
        assert tensors.read(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_module_saved_here(tmp_path, zipped, protocol):
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = tmp_path / "pytorch_model.bin"
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    for saved in (module.state_dict(), module.state_dict(keep_vars=True), {"state_dict": module.state_dict()}):
        torch.save(saved, file, **options)
        tensors = open_torch(file)
        assert list(tensors) == list(module.state_dict())
        for name, tensor in module.state_dict().items():
            assert equal(tensors.read(name), tensor.numpy()), name


def test_strides_that_overlap_or_say_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(6.0)
    state = {"windows": base.unfold(0, 2, 4), "row": base.as_strided((1, 3), (10**9, 2)), "thin": base[:0]}
    torch.save(state, tmp_path / "a.bin")
    tensors = open_torch(tmp_path / "a.bin")
    assert all(equal(tensors.read(name), tensor.numpy()) for name, tensor in state.items())


@pytest.mark.parametrize(
    "value, named",
    [
        ({"a": 3}, "a is of type int"),
        ({"model": {"w": None}, "epoch": 3}, "model is of type dict"),
        ({"model": {"w": [1]}}, "w is of type list"),
        ([], "of type list"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_anything_but_tensors_is_named(tmp_path, value, named, zipped):
    refused(write(tmp_path, pickle.dumps(value, 2), zipped=zipped), named)


def test_types_that_only_newer_torch_knows_are_named(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "torch._utils._rebuild_tensor_v3")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"\x80", b"not weights\n", b"version https://git-lfs.github.com/spec/v1"]
)
def test_other_files(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin")
    refused(tmp_path / "absent.bin", "No such file")


def test_state_dict_order_is_the_file_s(tmp_path):
    torch = pytest.importorskip("torch")
    names = ["b", "a", "c"]
    torch.save(collections.OrderedDict((name, torch.zeros(1)) for name in names), tmp_path / "a.bin")
    buffer = io.BytesIO((tmp_path / "a.bin").read_bytes())
    assert list(open_torch(tmp_path / "a.bin")) == list(torch.load(buffer)) == names


# The layout of older versions.


def test_the_old_file_written_by_hand_is_read(tmp_path):
    file = old(tmp_path, MAGIC, PROTOCOL, SYSTEM, old_state(), ["7"], storages=SIZE + FLOATS)
    assert equal(open_torch(file).read("w"), np.arange(4, dtype=np.float32).reshape(2, 2))


OLD = {
    "another magic number": ((1, PROTOCOL, SYSTEM, old_state(), ["7"]), "neither a zip file nor"),
    "another protocol": ((MAGIC, 1002, SYSTEM, old_state(), ["7"]), "neither a zip file nor"),
    "big-endian": ((MAGIC, PROTOCOL, {"little_endian": False}, old_state(), ["7"]), "little-endian"),
    "no list of keys": ((MAGIC, PROTOCOL, SYSTEM, old_state(), "7"), "list of storages"),
    "keys of another type": ((MAGIC, PROTOCOL, SYSTEM, old_state(), [7]), "list of storages"),
    "a key twice": ((MAGIC, PROTOCOL, SYSTEM, old_state(), ["7", "7"]), "list of storages"),
    "no key": ((MAGIC, PROTOCOL, SYSTEM, old_state(), []), "list of storages"),
    "a part of another storage": ((MAGIC, PROTOCOL, SYSTEM, old_state(view=counts(1, 2, 3)), ["7"]), "storage"),
    "more elements than are there": ((MAGIC, PROTOCOL, SYSTEM, old_state(2**60), ["7"]), "storage 7"),
    "two sizes of a storage": (
        (MAGIC, PROTOCOL, SYSTEM, state(old_tensor() + b"s" + text("v") + old_tensor(8, shape=counts(4, 2))), ["7"]),
        "storage 7 has two",
    ),
    "a pickle missing": ((MAGIC, PROTOCOL, SYSTEM), "pickle"),
}


@pytest.mark.parametrize("case", OLD)
def test_damaged_old_files(tmp_path, case):
    parts, *words = OLD[case]
    refused(old(tmp_path, *parts, storages=SIZE + FLOATS), *words)


@pytest.mark.parametrize("storages", [b"", SIZE, SIZE + FLOATS[:-1], SIZE + FLOATS + b"\0", b"\xff" * 8 + FLOATS])
def test_old_storages_that_do_not_fill_the_file(tmp_path, storages):
    refused(old(tmp_path, MAGIC, PROTOCOL, SYSTEM, old_state(), ["7"], storages=storages), "stor")


def test_a_file_larger_than_memory_is_not_read(tmp_path):
    elements = 2**38  # 1 TB, of which the file system holds a few pages
    file = old(tmp_path, MAGIC, PROTOCOL, SYSTEM, old_state(elements), ["7"], storages=struct.pack("<Q", elements))
    try:
        os.truncate(file, file.stat().st_size + 4 * elements)
    except OSError:
        pytest.skip("the file system holds no file of 1 TB")
    assert not open_torch(file).read("w").any()
