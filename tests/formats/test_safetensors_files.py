"""safetensors files against the safetensors library, and headers that are not true."""

from __future__ import annotations

import json
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from cpmjax.formats.safetensors_files import open_safetensors, write_safetensors
from cpmjax.formats.tensors import TensorInfo
from cpmjax.run.errors import UserError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def equal(read, expected):
    return read.dtype == expected.dtype and read.shape == expected.shape and read.tobytes() == expected.tobytes()


def infos_of(arrays):
    return {name: TensorInfo(array.shape, array.dtype, "") for name, array in arrays.items()}


ARRAYS = {
    "odd": np.array([1, 2, 3], np.int8),
    "bf16": np.array([[1.5, -2.0, 3.25]], ml_dtypes.bfloat16),
    "f64": np.linspace(0, 1, 5),
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "名字": np.array([True, False]),
    "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    "i64": np.array([-(2**40)]),
    "i16": np.array([-300], np.int16),
    "u8": np.array([255], np.uint8),
}


@pytest.mark.smoke
@pytest.mark.parametrize("model, stored", [("minicpm-tiny-a", "F32"), ("minicpm-tiny-gqa", "BF16")])
def test_real_files_are_views_with_the_library_s_values(model, stored):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    file = GOLDEN / model / "model.safetensors"
    tensors, expected = open_safetensors(file), safetensors_numpy.load_file(file)
    assert tensors.keys() == expected.keys()
    for name, info in tensors.items():
        read = tensors.read(name)
        assert equal(read, expected[name]), name
        assert (info.shape, info.dtype, info.stored) == (read.shape, read.dtype, stored)
        assert not read.flags.writeable and not read.flags.owndata
    with pytest.raises(KeyError):
        tensors.read("absent")


def test_what_is_written_is_read_by_the_library_and_by_us(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    file = tmp_path / "a.safetensors"
    write_safetensors(file, infos_of(ARRAYS), iter(ARRAYS.values()))
    tensors = open_safetensors(file)
    with safetensors.safe_open(file, "np") as theirs:
        assert theirs.metadata() == {"format": "pt"}
        assert set(theirs.keys()) == tensors.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert equal(theirs.get_tensor(name), array), name
            assert equal(tensors.read(name), array), name
            assert tensors.read(name).flags.aligned, name


def test_torch_reads_what_is_written(tmp_path):
    pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    file = tmp_path / "a.safetensors"
    write_safetensors(file, infos_of(ARRAYS), ARRAYS.values())
    read = safetensors_torch.load_file(file)
    assert all(read[name].float().tolist() == array.astype(np.float32).tolist() for name, array in ARRAYS.items())


def test_arrays_are_taken_one_at_a_time(tmp_path):
    infos = {str(number): TensorInfo((4,), np.dtype(np.float32), "F32") for number in range(3)}
    file, sizes = tmp_path / "a.safetensors", []

    def arrays():
        for number in range(3):
            yield np.full(4, number, np.float32)
            sizes.append(number)

    write_safetensors(file, infos, arrays())
    assert sizes == [0, 1, 2] and open_safetensors(file).read("2").tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "arrays, message",
    [
        ([np.zeros(3, np.float32)], r"a: float32 \(3,\); expected float32 \(2,\)"),
        ([np.zeros(2, np.float16)], "a: float16"),
        ([], "shorter"),
        ([np.zeros(2, np.float32)] * 2, "longer"),
    ],
)
def test_arrays_that_are_not_as_declared(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "a", {"a": TensorInfo((2,), np.dtype(np.float32), "F32")}, arrays)


def test_a_dtype_that_the_format_lacks(tmp_path):
    array = np.zeros(2, ml_dtypes.float8_e4m3fn)
    with pytest.raises(ValueError, match="a: float8_e4m3fn cannot be written"):
        write_safetensors(tmp_path / "a", infos_of({"a": array}), [array])


def refused(file, *words):
    with pytest.raises(UserError) as caught:
        open_safetensors(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "; expected " in message and message.isprintable(), message
    assert all(word in message.removeprefix(str(file)) for word in words), message


def with_header(folder, header, data=bytes(16)):
    text = header if type(header) is bytes else json.dumps(header).encode()
    file = folder / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_header_written_by_hand_is_read(tmp_path):
    # Or what is refused below could be refused for another reason.
    file = with_header(tmp_path, {"__metadata__": {"format": "pt"}, "w": entry()})
    assert open_safetensors(file)["w"].shape == (2, 2)
    deep = with_header(tmp_path, {"w": entry(shape=[1] * 62 + [2, 2])})
    assert open_safetensors(deep).read("w").ndim == 64


WRONG = {
    "unknown dtype": ({"w": entry("F8_E4M3")}, "w: dtype 'F8_E4M3' is unknown", "BF16"),
    "dtype of a list": ({"w": entry([])}, "w: dtype"),
    "negative size": ({"w": entry(shape=[-2, -2])}, "w: its shape"),
    "size of a fraction": ({"w": entry(shape=[2.0, 2])}, "w: its shape"),
    "size of true": ({"w": entry(shape=[True, 4])}, "w: its shape"),
    "shape of a number": ({"w": entry(shape=4)}, "w: its shape"),
    "65 dimensions": ({"w": entry(shape=[1] * 64 + [4])}, "w: its shape"),
    "sizes that overflow": ({"w": entry(shape=[2**32, 2**32])}, "w: its shape"),
    "empty and too large": ({"w": entry(shape=[0, 2**62, 4], offsets=[0, 0])}, "w: its shape"),
    "shape and range": ({"w": entry(shape=[3])}, "w: its data_offsets", "12 bytes"),
    "range backwards": ({"w": entry(offsets=[16, 0])}, "w: its data_offsets"),
    "three offsets": ({"w": entry(offsets=[0, 16, 16])}, "w: its data_offsets"),
    "offset of a text": ({"w": entry(offsets=["0", "16"])}, "w: its data_offsets"),
    "negative offsets": ({"w": entry(offsets=[-16, 0])}, "w: its data_offsets"),
    "beyond the file": ({"w": entry(shape=[8], offsets=[0, 32])}, "w lies at 0 of 16"),
    "beyond all files": ({"w": entry(offsets=[2**70, 2**70 + 16])}, "w lies at"),
    "a hole in front": ({"w": entry(shape=[2], offsets=[8, 16])}, "w lies at 8", "expected it at 0"),
    "a hole behind": ({"w": entry(shape=[2], offsets=[0, 8])}, "end at 8 of 16"),
    "a hole between": ({"v": entry(shape=[1], offsets=[0, 4]), "w": entry(shape=[2], offsets=[8, 16])}, "w lies at 8"),
    "overlap": ({"v": entry(), "w": entry(shape=[2], offsets=[8, 16])}, "w lies at 8", "expected it at 16"),
    "the same twice": ({"v": entry(), "w": entry()}, "w lies at 0"),
    "a field missing": ({"w": {"dtype": "F32", "shape": [4]}}, "w: its header"),
    "a field more": ({"w": entry() | {"more": 1}}, "w: its header"),
    "no object": ({"w": 7}, "w: its header"),
    "name of two lines": ({"a\nb": entry()}, "'a\\nb'"),
    "half a surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "\\ud800"),
    "metadata of numbers": ({"__metadata__": {"step": 3}, "w": entry()}, "__metadata__"),
    "metadata of a list": ({"__metadata__": [], "w": entry()}, "__metadata__"),
    "a name twice": (b'{"w":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "twice"),
    "a list": ([], "JSON"),
    "spaces in front": (b'  {"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "JSON"),
    "no UTF-8": (b'{"\xff":1}', "JSON"),
    "half an object": (b'{"w":', "JSON"),
    "deep": (b'{"w":' + b"[" * 100_000, "JSON"),
    "digits": (b'{"w":' + b"1" * 100_000 + b"}", "JSON"),
    "nothing but data": ({}, "end at 0 of 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_headers_that_are_not_true(tmp_path, case):
    header, *words = WRONG[case]
    refused(with_header(tmp_path, header), *words)


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, 2**31, 17 << 20, 17])
def test_header_lengths_beyond_the_file(tmp_path, size):
    file = tmp_path / "a.safetensors"
    file.write_bytes(size.to_bytes(8, "little") + b"{}" + bytes(14))
    refused(file, "whole")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\0" * 8, b"version https://git-lfs.github.com/spec/v1"])
def test_other_files(tmp_path, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    refused(file)
    refused(tmp_path / "absent.safetensors", "No such file")


def test_what_the_library_refuses_is_refused(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors")
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    import fuzz_readers

    sample = (GOLDEN / "torch" / "expected.safetensors").read_bytes()
    draw, file, both = random.Random(0), tmp_path / "a.safetensors", {True: 0, False: 0}
    for _ in range(2000):
        file.write_bytes(draw.choice((fuzz_readers.damage_safetensors_header, fuzz_readers.mutate))(sample, draw))
        try:
            tensors = open_safetensors(file)
        except UserError:
            both[False] += 1
            continue
        both[True] += 1
        with safetensors.safe_open(file, "np") as theirs:  # raises if it refuses
            assert set(theirs.keys()) == tensors.keys()
            for name in tensors:
                assert theirs.get_tensor(name).tobytes() == tensors.read(name).tobytes(), name
    assert min(both.values()) > 50
