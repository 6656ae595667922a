from __future__ import annotations

import struct
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from formats.llama_cpp import LlamaCpp
from gguf import GGMLQuantizationType as GgmlType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from cpmjax.formats.gguf_files import open_gguf, storable, write_gguf
from cpmjax.run.errors import UserError

GOLDEN = Path(__file__).parents[2].parent / "shared/golden/minicpm-tiny-gguf"
FILES = ("model-f16.gguf", "model-q8_0.gguf", "model-q4_k_m.gguf")
ARCHITECTURE = {"general.architecture": "minicpm"}

needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs {GOLDEN}")
any_folder = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(path: Path) -> str:
    """What the user reads, having spent no more memory than twice the file and a little."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert peak < 2 * path.stat().st_size + 200_000
    assert "\n" not in message and message.startswith(f"{path}: ") and "expected" in message
    return message


# What llama.cpp wrote


@needs_golden
@pytest.mark.parametrize("name", FILES)
def test_llama_cpps_files_hold_what_the_gguf_package_finds_in_them(name):
    ours, theirs = open_gguf(GOLDEN / name), gguf.GGUFReader(GOLDEN / name)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in ours.metadata.items()}
    assert found == fields
    assert list(ours) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        numbers, info = ours.read(tensor.name), ours[tensor.name]
        assert (numbers.shape, numbers.dtype) == (info.shape, info.dtype)
        assert info.shape == tuple(tensor.shape[::-1].tolist()) and info.stored == tensor.tensor_type.name
        np.testing.assert_array_equal(numbers, gguf.dequantize(tensor.data, tensor.tensor_type))
        assert not numbers.flags.writeable


@needs_golden
def test_weights_are_those_of_the_checkpoint_and_quantised_ones_are_near():
    embedding = load_file(GOLDEN / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(open_gguf(GOLDEN / FILES[0]).read("token_embd.weight"), embedding)
    exact = open_gguf(GOLDEN / FILES[0])
    # Steps of 1/127, and of 1/15 of the largest number in a block, spread over normal numbers.
    for name, tolerance in ((FILES[1], 0.01), (FILES[2], 0.1)):
        quantised = open_gguf(GOLDEN / name)
        for tensor in exact:
            difference = quantised.read(tensor) - exact.read(tensor).astype(np.float32)
            assert np.linalg.norm(difference) < tolerance * np.linalg.norm(exact.read(tensor).astype(np.float32))


@needs_golden
@pytest.mark.parametrize("name", FILES[:2])
def test_the_same_weights_make_llama_cpps_file_byte_for_byte(tmp_path, name):
    exact, wanted = open_gguf(GOLDEN / FILES[0]), open_gguf(GOLDEN / name)
    infos = {tensor: (info.shape, GgmlType[wanted[tensor].stored]) for tensor, info in exact.items()}
    write_gguf(tmp_path / "ours.gguf", wanted.metadata, infos, map(exact.read, exact))
    assert (tmp_path / "ours.gguf").read_bytes() == (GOLDEN / name).read_bytes()


@needs_golden
def test_llama_cpp_computes_with_4_bits_as_with_the_numbers_they_stand_for(tmp_path):
    exact = open_gguf(GOLDEN / FILES[0])
    infos = {name: (info.shape, storable(info.shape, GgmlType.Q4_0)) for name, info in exact.items()}
    write_gguf(tmp_path / "q4_0.gguf", exact.metadata, infos, map(exact.read, exact))
    quantised = open_gguf(tmp_path / "q4_0.gguf")
    plain = {name: (info.shape, GgmlType.F32) for name, info in exact.items()}
    write_gguf(tmp_path / "f32.gguf", exact.metadata, plain, map(quantised.read, quantised))
    write_gguf(tmp_path / "exact.gguf", exact.metadata, plain, map(exact.read, exact))
    ids = np.load(GOLDEN / "expected.npz")["input_ids"].ravel().tolist()
    bits, numbers, unquantised = (
        LlamaCpp(tmp_path / name).log_probabilities(ids) for name in ("q4_0.gguf", "f32.gguf", "exact.gguf")
    )
    # With 4 bits llama.cpp rounds activations to 8; that moves less than 4 bits move the weights.
    assert np.abs(bits - numbers).max() < 0.5 * np.abs(numbers - unquantised).max()


# What is written is read


scalars = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False),
    st.text(st.characters(codec="utf-8")),
)
number_types = [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64, np.bool_]
values = st.one_of(
    scalars,
    st.lists(st.text(st.characters(codec="utf-8")), min_size=1),
    st.builds(
        lambda raw, dtype: np.frombuffer(bytes(byte % 2 for byte in raw) * 8, dtype),
        st.binary(min_size=1, max_size=40),
        st.sampled_from(number_types),
    ),
)
names = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=64)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
tensors = st.dictionaries(names, st.tuples(shapes, st.sampled_from(["F32", "F16", "BF16", "Q8_0", "Q4_0"])), max_size=5)


@any_folder
@given(st.dictionaries(names, values), tensors, st.randoms())
def test_everything_written_is_read_back(tmp_path, metadata, drawn, random):
    path = tmp_path / "some.gguf"
    metadata |= ARCHITECTURE | {"general.alignment": random.choice([8, 32, 64])}
    infos = {
        name: ((*shape[:-1], shape[-1] * gguf.GGML_QUANT_SIZES[GgmlType[type_]][0]), GgmlType[type_])
        for name, (shape, type_) in drawn.items()
    }
    generator = np.random.default_rng(random.randrange(2**32))
    arrays = {name: generator.standard_normal(shape, np.float32) for name, (shape, _) in infos.items()}
    write_gguf(path, metadata, infos, arrays.values())
    file = open_gguf(path)
    assert file.metadata.keys() == metadata.keys()
    for key, value in metadata.items():
        found = file.metadata[key]
        assert type(found) is type(value)
        np.testing.assert_array_equal(found, value)
        assert getattr(found, "dtype", None) == getattr(value, "dtype", None)
    assert list(file) == list(infos)
    for name, (shape, type_) in infos.items():
        assert file[name].shape == shape and file[name].stored == type_.name
        largest = np.abs(arrays[name]).max()
        error = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 220, "Q4_0": 1 / 7.9}[type_.name]
        np.testing.assert_allclose(file.read(name).astype(np.float32), arrays[name], atol=largest * error, rtol=0)
    theirs = gguf.GGUFReader(path) if infos else None
    for tensor in theirs.tensors if theirs else ():
        np.testing.assert_array_equal(
            gguf.dequantize(tensor.data, tensor.tensor_type), file.read(tensor.name).astype(np.float32)
        )


def test_the_type_that_a_tensor_gets():
    assert storable((2304,), GgmlType.Q8_0) == storable((2304,), GgmlType.F16) == GgmlType.F32
    assert storable((503, 2304), GgmlType.Q8_0) == GgmlType.Q8_0
    assert storable((503, 2305), GgmlType.Q4_0) == GgmlType.F16
    assert storable((503, 2305), GgmlType.BF16) == GgmlType.BF16


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_any_float_type_is_taken(tmp_path, dtype):
    path, array = tmp_path / "a.gguf", np.arange(-64, 64).reshape(2, 64).astype(dtype)
    for type_ in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        write_gguf(path, ARCHITECTURE, {"a": (array.shape, type_)}, [array])
        np.testing.assert_array_equal(open_gguf(path).read("a").astype(np.float32), array.astype(np.float32))


def test_writing_a_large_tensor_needs_little_memory(tmp_path):
    array = np.ones((2304, 16_000), np.float32).T  # 147 MB, and rows that lie apart as those of our matrices do
    for type_ in (GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0):
        tracemalloc.start()
        write_gguf(tmp_path / "large.gguf", ARCHITECTURE, {"a": (array.shape, type_)}, [array])
        assert tracemalloc.get_traced_memory()[1] < 32e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("type_", "number"),
    [("F16", 65520), ("F16", np.nan), ("BF16", 3.4e38), ("Q8_0", 1e7), ("Q8_0", np.inf), ("Q4_0", 1e6)],
)
def test_numbers_too_large_for_their_type_are_refused(tmp_path, type_, number):
    array = np.zeros((2, 32), np.float32)
    array[1, 5] = -number
    with pytest.raises(UserError, match=f"a.gguf: output holds .* {type_}"):
        write_gguf(tmp_path / "a.gguf", ARCHITECTURE, {"output": (array.shape, GgmlType[type_])}, [array])


def test_arrays_that_are_not_as_announced_are_refused(tmp_path):
    infos = {"a": ((2, 32), GgmlType.F32)}
    for arrays in ([np.zeros((32, 2))], [], [np.zeros((2, 32))] * 2):
        with pytest.raises(ValueError):
            write_gguf(tmp_path / "a.gguf", ARCHITECTURE, infos, arrays)


# Files that lie


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dimensions: tuple[int, ...], kind: int, offset: int) -> bytes:
    numbers = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return text(name) + numbers


def whole(keys: Sequence[bytes] = (), tensors: Sequence[bytes] = ()) -> bytes:
    """A file with room for 256 bytes of tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32 + 256)


STRING, ARRAY, UINT32, BOOL = 8, 9, 4, 7
LIES = {
    "no magic": (b"GGML" + bytes(100), "letters GGUF"),
    "four bytes": (b"GGUF", "version"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "version 0": (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0"),
    "version 4": (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^60 tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(99),
        "number of tensors says 1152921504606846976",
    ),
    "2^60 keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(99), "number of keys says 1152921504606846976"),
    "a key of 2^63 bytes": (whole([struct.pack("<Q", 2**63)]), "9223372036854775808 bytes"),
    "a string of 2^63 bytes": (whole([key("a.b", STRING, struct.pack("<Q", 2**63))]), "a.b needs 9223372036854775808"),
    "an array of 2^61": (whole([key("a.b", ARRAY, struct.pack("<IQ", 6, 2**61))]), "a.b says 2305843009213693952"),
    "2^61 strings": (whole([key("a.b", ARRAY, struct.pack("<IQ", STRING, 2**61))]), "a.b says 2305843009213693952"),
    "an array of arrays": (whole([key("a.b", ARRAY, struct.pack("<IQ", ARRAY, 1))]), "a.b is an array of arrays"),
    "a value of type 13": (whole([key("a.b", 13, bytes(8))]), "a.b is a value of type 13"),
    "elements of type 99": (whole([key("a.b", ARRAY, struct.pack("<IQ", 99, 1))]), "a.b is a value of type 99"),
    "a truth value of 2": (whole([key("a.b", BOOL, b"\2")]), "a.b is a truth value of 2"),
    "a string that is no UTF-8": (whole([key("a.b", STRING, text(b"\xff"))]), "a.b is not UTF-8"),
    "a surrogate": (whole([key("a.b", STRING, text(b"\xed\xa0\x80"))]), "a.b is not UTF-8"),
    "a token that is no UTF-8": (
        whole([key("a.b", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"a\xc3"))]),
        "a.b is not UTF-8",
    ),
    "a key of two lines": (whole([key("a\nb", UINT32, bytes(4))]), r"a key is 'a\nb'"),
    "a key without a name": (whole([key("", UINT32, bytes(4))]), "a key is ''"),
    "a long key": (whole([key("a" * 65536, UINT32, bytes(4))]), "65536 bytes"),
    "a key twice": (whole([key("a.b", UINT32, bytes(4))] * 2), "a.b is there twice"),
    **{
        f"an alignment of {size}": (
            whole([key("general.alignment", UINT32, struct.pack("<I", size))]),
            f"general.alignment = {size}",
        )
        for size in (0, 1, 24, 2**31)
    },
    "an alignment of letters": (whole([key("general.alignment", STRING, text("32"))]), "general.alignment = '32'"),
    "a tensor twice": (whole(tensors=[tensor("a", (4,), 0, 0), tensor("a", (4,), 0, 32)]), "a is there twice"),
    "a long name": (whole(tensors=[tensor("a" * 65, (4,), 0, 0)]), "65 bytes"),
    "no dimensions": (whole(tensors=[tensor("a", (), 0, 0)]), "a has 0 dimensions"),
    "5 dimensions": (whole(tensors=[tensor("a", (1,) * 5, 0, 0)]), "a has 5 dimensions"),
    "2^32 dimensions": (whole(tensors=[text("a") + struct.pack("<I", 2**32 - 1)]), "a has 4294967295 dimensions"),
    "an empty dimension": (whole(tensors=[tensor("a", (4, 0), 0, 0)]), r"a has the shape (0, 4)"),
    # 2^42 + 1 rows of 2^22 floats are 2^66 + 2^24 bytes, which 64 bits take for 2^24.
    "dimensions that overflow": (
        whole(tensors=[tensor("a", (2**22, 2**42 + 1), 0, 0)]),
        "a has the shape (4398046511105",
    ),
    "2^64 - 1 floats": (whole(tensors=[tensor("a", (2**64 - 1,) * 4, 0, 0)]), "a has the shape (18446744073709551615"),
    "a type that is gone": (whole(tensors=[tensor("a", (32,), 4, 0)]), "a is of type 4"),
    "a type of the future": (whole(tensors=[tensor("a", (32,), 10**6, 0)]), "a is of type 1000000"),
    "half a block": (whole(tensors=[tensor("a", (48,), 8, 0)]), "a is Q8_0 with rows of 48"),
    "an offset between places": (whole(tensors=[tensor("a", (4,), 0, 8)]), "a begins at 8"),
    "an offset outside": (
        whole(tensors=[tensor("a", (4,), 0, 2**63)]),
        "a ends 9223372036854775568 bytes behind the end",
    ),
    "an offset that overflows": (whole(tensors=[tensor("a", (64,), 0, 2**64 - 32)]), "behind the end"),
    "an overlap": (whole(tensors=[tensor("a", (4,), 0, 32), tensor("b", (9,), 0, 0)]), "a begins inside b"),
    "the same place": (whole(tensors=[tensor("a", (4,), 0, 0), tensor("b", (4,), 0, 0)]), "begins inside"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path, name):
    content, words = LIES[name]
    (tmp_path / "lie.gguf").write_bytes(content)
    assert words in refusal(tmp_path / "lie.gguf")


def test_the_truth_in_the_same_words_is_read(tmp_path):
    tensors = [tensor("a", (4, 2), 0, 64), tensor("b", (32,), 8, 0)]
    keys = [key("general.alignment", UINT32, struct.pack("<I", 64)), key("a.b", ARRAY, struct.pack("<IQ", 6, 0))]
    head = b"GGUF" + struct.pack("<IQQ", 2, 2, 2) + b"".join(keys + tensors)
    content = head + bytes(-len(head) % 64) + bytes(64) + np.arange(8, dtype=np.float32).tobytes()
    (tmp_path / "a.gguf").write_bytes(content)
    file = open_gguf(tmp_path / "a.gguf")
    np.testing.assert_array_equal(file.read("a"), np.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(file.read("b"), np.zeros(32))
    assert file.metadata["general.alignment"] == 64 and file.metadata["a.b"].shape == (0,)
    with pytest.raises(KeyError):
        file.read("c")


@pytest.mark.parametrize("type_", [GgmlType.Q8_0, GgmlType.Q4_0])
def test_a_block_with_a_damaged_scale_is_no_number_and_no_warning(tmp_path, type_):
    path = tmp_path / "file.gguf"
    numbers = np.arange(64, dtype=np.float32).reshape(2, 32)  # infinity times 0 is none
    write_gguf(path, {"general.architecture": "minicpm"}, {"m": ((2, 32), type_)}, [numbers])
    content = bytearray(path.read_bytes())
    first = open_gguf(path)._stored["m"]
    at = content.rindex(first.tobytes())
    content[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = open_gguf(path).read("m")
    assert not np.isfinite(read[0]).any() and np.isfinite(read[1]).all()


def test_types_without_numbers_are_refused_when_they_are_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(whole(tensors=[tensor("a", (32,), GgmlType.Q8_1, 0)]))
    file = open_gguf(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="a is Q8_1"):
        file.read("a")


@pytest.fixture
def small(tmp_path):
    """A file with one of everything, and without padding at its end."""
    metadata = ARCHITECTURE | {
        "x.int": 7,
        "x.real": 0.5,
        "x.true": True,
        "x.words": ["a", "字"],
        "x.array": np.arange(3),
    }
    infos = {"matrix": ((2, 32), GgmlType.Q4_0), "vector": ((8,), GgmlType.F32)}
    write_gguf(tmp_path / "small.gguf", metadata, infos, [np.ones((2, 32)), np.ones(8)])
    return tmp_path / "small.gguf"


def test_a_file_cut_short_anywhere_is_refused(small):
    content = small.read_bytes()
    cut = small.with_name("cut.gguf")
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        refusal(cut)


@settings(any_folder, max_examples=500)
@given(st.data())
def test_damage_anywhere_is_refused_or_read(small, data):
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    damaged = small.with_name("damaged.gguf")
    damaged.write_bytes(content)
    try:
        file = open_gguf(damaged)
        for name, info in file.items():
            assert file.read(name).shape == info.shape
    except UserError as error:
        assert "\n" not in str(error)


def test_missing_and_empty_files_are_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    for name in ("empty.gguf", "missing.gguf", "."):
        with pytest.raises(UserError, match="expected a GGUF file"):
            open_gguf(tmp_path / name)
