"""GGUF, the files of llama.cpp: read with every claim held against the file's size, written a tensor at a time.

Layout: docs/gguf.md of ggml. Constants, block sizes and quantisation come from the `gguf` package; its reader does not,
because that one believes what a file says of itself.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as GgmlType
from gguf import GGUFValueType as ValueType

from cpmjax.formats.tensors import TensorInfo, Tensors, map_file
from cpmjax.run.errors import UserError

# How metadata looks in Python. Read: every integer type as int, every float type as float, arrays of numbers as numpy
# arrays of the file's type. Written: int as uint32, float as float32, arrays of numbers as their own type.
Value = bool | int | float | str | list[str] | np.ndarray

_NUMBERS: dict[ValueType, np.dtype] = {
    ValueType.UINT8: np.dtype(np.uint8),
    ValueType.INT8: np.dtype(np.int8),
    ValueType.UINT16: np.dtype(np.uint16),
    ValueType.INT16: np.dtype(np.int16),
    ValueType.UINT32: np.dtype(np.uint32),
    ValueType.INT32: np.dtype(np.int32),
    ValueType.FLOAT32: np.dtype(np.float32),
    ValueType.BOOL: np.dtype(np.bool_),
    ValueType.UINT64: np.dtype(np.uint64),
    ValueType.INT64: np.dtype(np.int64),
    ValueType.FLOAT64: np.dtype(np.float64),
}
# The element types that numpy knows too; all others are blocks of quantised numbers.
_PLAIN: dict[GgmlType, np.dtype] = {
    GgmlType.F32: np.dtype(np.float32),
    GgmlType.F16: np.dtype(np.float16),
    GgmlType.BF16: np.dtype(ml_dtypes.bfloat16),
    GgmlType.F64: np.dtype(np.float64),
    GgmlType.I8: np.dtype(np.int8),
    GgmlType.I16: np.dtype(np.int16),
    GgmlType.I32: np.dtype(np.int32),
    GgmlType.I64: np.dtype(np.int64),
}
_LARGEST = {  # what can be written, and up to which size a number; scales of blocks are float16
    GgmlType.F32: math.inf,
    GgmlType.F16: 65504.0,
    GgmlType.BF16: float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
    GgmlType.Q8_0: 127 * 65504.0,
    GgmlType.Q4_0: 8 * 65504.0,
}
_ALIGNMENT = "general.alignment"
_LONGEST_NAME, _LONGEST_KEY = 64, 65535  # bytes, by the specification
_AT_ONCE = 2**20  # numbers that are converted together


class GgufFile(Tensors):
    """The tensors of a GGUF file, shapes rows first, and its metadata. Quantised tensors are read as float32."""

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Value],
        infos: dict[str, TensorInfo],
        stored: dict[str, np.ndarray],
    ) -> None:
        """`stored` are the bytes of each tensor."""
        super().__init__(path, infos)
        self.metadata = metadata
        self._stored = stored

    def read(self, name: str) -> np.ndarray:
        """As `Tensors.read`. Raises UserError for quantised types that the `gguf` package cannot turn into numbers."""
        info, stored = self[name], self._stored[name]
        type_ = GgmlType[info.stored]
        if type_ in _PLAIN:
            return stored.view(info.dtype).reshape(info.shape)
        rows = math.prod(info.shape[:-1])
        blocks = stored.reshape(rows, -1)
        numbers = np.empty((rows, info.shape[-1]), np.float32)
        for some in _row_blocks(numbers.shape):
            try:
                # What a damaged file holds may be no number: that is for whoever computes with it to say.
                with np.errstate(invalid="ignore", over="ignore"):
                    numbers[some] = gguf.dequantize(blocks[some], type_)
            except NotImplementedError as error:
                raise UserError(
                    f"{self.path}: {name} is {info.stored}, which nothing here can read; "
                    "expected a type that the gguf package dequantises"
                ) from error
        numbers.flags.writeable = False
        return numbers.reshape(info.shape)


def open_gguf(path: Path) -> GgufFile:
    """Opens a little-endian GGUF file of version 2 or 3.

    Raises UserError, naming the file and the key or tensor, wherever the file is not what the specification says, or
    says something that does not fit into it: nothing is allocated before the size is known to be there.
    """
    data = map_file(path, "a GGUF file")
    head = _Head(path, data)
    head.magic()
    tensors = head.count("number of tensors", 32)
    keys = head.count("number of keys", 13)
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = head.name("a key", _LONGEST_KEY)
        if key in metadata:
            raise head.error(f"{key} is there twice", "each key once")
        metadata[key] = head.value(key)
    alignment = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
    if not (isinstance(alignment, int) and 8 <= alignment <= 2**16 and alignment.bit_count() == 1):
        raise head.error(f"{_ALIGNMENT} = {_short(alignment)}", "a power of two from 8 to 65536")

    infos: dict[str, TensorInfo] = {}
    spans: dict[str, range] = {}  # of bytes, from the first tensor on
    for _ in range(tensors):
        name = head.name("the name of a tensor", _LONGEST_NAME)
        if name in infos:
            raise head.error(f"{name} is there twice", "each tensor once")
        infos[name], spans[name] = head.tensor(name)
        if spans[name].start % alignment:
            raise head.error(f"{name} begins at {spans[name].start}", f"a multiple of {alignment}")
    for before, after in itertools.pairwise(sorted(spans, key=lambda name: spans[name].start)):
        if spans[after].start < spans[before].stop:
            raise head.error(f"{after} begins inside {before}", "tensors that do not overlap")
    first = head.position + -head.position % alignment
    for name, span in spans.items():
        if first + span.stop > data.size:
            raise head.error(f"{name} ends {first + span.stop - data.size} bytes behind the end", "a whole file")
    stored = {name: data[first + span.start : first + span.stop] for name, span in spans.items()}
    return GgufFile(path, metadata, infos, stored)


class _Head:
    """Reads what stands before the tensors, front to back and never past the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.position = 0
        self._path = path
        self._data = data

    def error(self, problem: str, expected: str) -> UserError:
        return UserError(f"{self._path}: {problem}; expected {expected}")

    def magic(self) -> None:
        if bytes(self._data[:4]) != b"GGUF":
            raise self.error("does not begin with the letters GGUF", "a GGUF file")
        self._take(4, "the magic")
        version = self._integer("<I", "the version")
        # The version of a big-endian file, read as little-endian, has its digits in the upper half.
        if version and not version & 0xFFFF:
            raise self.error("a big-endian GGUF file", "a little-endian one")
        if version not in (2, 3):
            raise self.error(f"GGUF version {version}", "version 2 or 3")

    def count(self, what: str, smallest: int) -> int:
        """How many things of at least `smallest` bytes follow."""
        count = self._integer("<Q", what)
        left = self._data.size - self.position
        if count * smallest > left:
            raise self.error(f"{what} says {count}, and {left} bytes follow", f"at most {left // smallest}")
        return count

    def name(self, what: str, longest: int) -> str:
        name = self._text(what, longest)
        # It goes into messages of one line.
        if not name.isprintable() or not name:
            raise self.error(f"{what} is {_short(name)}", "printable characters")
        return name

    def value(self, key: str) -> Value:
        kind = self._kind(key)
        if kind == ValueType.STRING:
            return self._text(key)
        if kind != ValueType.ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        kind = self._kind(key)
        if kind == ValueType.ARRAY:
            raise self.error(f"{key} is an array of arrays", "an array of numbers or strings")
        if kind == ValueType.STRING:
            return [self._text(key) for _ in range(self.count(key, 8))]
        return self._numbers(kind, self.count(key, _NUMBERS[kind].itemsize), key)

    def tensor(self, name: str) -> tuple[TensorInfo, range]:
        """What the file says of a tensor, and which bytes it has, counted from the first tensor."""
        dimensions = self._integer("<I", name)
        if not 1 <= dimensions <= 4:
            raise self.error(f"{name} has {dimensions} dimensions", "1 to 4")
        shape = tuple(self._integer("<Q", name) for _ in range(dimensions))[::-1]
        number, offset = self._integer("<I", name), self._integer("<Q", name)
        try:
            type_ = GgmlType(number)
        except ValueError as error:
            raise self.error(f"{name} is of type {number}", "one that the gguf package knows") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        if 0 in shape:
            raise self.error(f"{name} has the shape {shape}", "no empty dimension")
        if shape[-1] % block:
            raise self.error(f"{name} is {type_.name} with rows of {shape[-1]}", f"a multiple of {block}")
        size = math.prod(shape) // block * block_bytes
        if size > self._data.size:
            raise self.error(f"{name} has the shape {shape}, more than the file holds", "a whole file")
        dtype = _PLAIN.get(type_, np.dtype(np.float32))
        return TensorInfo(shape, dtype, type_.name), range(offset, offset + size)

    def _take(self, size: int, what: str) -> np.ndarray:
        left = self._data.size - self.position
        if size > left:
            raise self.error(f"{what} needs {size} bytes where {left} are left", "a whole file")
        self.position += size
        return self._data[self.position - size : self.position]

    def _integer(self, form: str, what: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form), what).tobytes())[0]

    def _numbers(self, kind: ValueType, count: int, what: str) -> np.ndarray:
        stored = self._take(count * _NUMBERS[kind].itemsize, what)
        if kind == ValueType.BOOL and stored.max(initial=0) > 1:
            raise self.error(f"{what} is a truth value of {stored.max()}", "0 or 1")
        return stored.view(_NUMBERS[kind])

    def _text(self, what: str, longest: int | None = None) -> str:
        size = self._integer("<Q", what)
        if longest is not None and size > longest:
            raise self.error(f"{what} has {size} bytes", f"at most {longest}")
        try:
            return self._take(size, what).tobytes().decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {self.position - size + error.start}", "text") from error

    def _kind(self, what: str) -> ValueType:
        number = self._integer("<I", what)
        try:
            return ValueType(number)
        except ValueError as error:
            raise self.error(f"{what} is a value of type {number}", f"a type from 0 to {max(ValueType)}") from error


def storable(shape: tuple[int, ...], wanted: GgmlType) -> GgmlType:
    """The type that a tensor really gets where a file is to be of type `wanted`, as llama.cpp chooses it.

    Vectors are F32. A matrix whose rows are no whole number of blocks is F16.
    """
    if len(shape) == 1:
        return GgmlType.F32
    return GgmlType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    infos: Mapping[str, tuple[tuple[int, ...], GgmlType]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes a GGUF file of version 3; when it returns, the file is on the disk.

    `metadata` is typed as `Value` says and has a "general.architecture"; lists and arrays in it are not empty. `infos`
    gives shape (rows first) and type of each tensor: F32, F16, BF16, Q8_0 or Q4_0, see `storable`. `arrays` are the
    tensors in that order, of any float type, each cast or quantised a few rows at a time. A kill leaves a part of a
    file: write beside the place and rename. Raises UserError if a number is too large for the type of its tensor.
    """
    alignment: Any = metadata.get(_ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    writer.data_alignment = alignment
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, (shape, type_) in infos.items():
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * block_bytes, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    try:
        with open(path, "ab") as file:
            for (name, (shape, type_)), array in zip(infos.items(), arrays, strict=True):
                file.write(bytes(-file.tell() % alignment))
                if array.shape != shape:
                    raise ValueError(f"{name} has the shape {array.shape}; expected {shape}")
                rows = array.reshape(-1, shape[-1])
                blocks = (rows[some] for some in _row_blocks(rows.shape))
                for encoded in _encoded(blocks, type_, f"{path}: {name}"):
                    file.write(encoded)
            # llama.cpp expects the padding of the last tensor too.
            file.write(bytes(-file.tell() % alignment))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """The package's own `add_string` and `add_array` leave out empty values and guess types."""
    if isinstance(value, np.ndarray):
        kind = next(kind for kind, dtype in _NUMBERS.items() if dtype == value.dtype)
        writer.add_key_value(key, value.tolist(), ValueType.ARRAY, kind)
    elif isinstance(value, list):
        writer.add_key_value(key, value, ValueType.ARRAY, ValueType.STRING)
    else:
        kinds = {bool: ValueType.BOOL, int: ValueType.UINT32, float: ValueType.FLOAT32, str: ValueType.STRING}
        writer.add_key_value(key, value, kinds[type(value)])


def _encoded(blocks: Iterable[np.ndarray], type_: GgmlType, what: str) -> Iterator[bytes]:
    """Each block encoded, in order; two threads work ahead, since quantising takes longer than the disk."""
    with ThreadPoolExecutor(2) as pool:
        ahead: deque[Future[bytes]] = deque()
        for block in blocks:
            ahead.append(pool.submit(_encode, block, type_, what))
            if len(ahead) > 2:
                yield ahead.popleft().result()
        yield from (each.result() for each in ahead)


def _encode(rows: np.ndarray, type_: GgmlType, what: str) -> bytes:
    numbers = rows.astype(np.float32, copy=False)
    # Not ">": a number that is none is too large for blocks as well.
    if type_ != GgmlType.F32 and not (largest := np.abs(numbers).max()) <= _LARGEST[type_]:
        raise UserError(f"{what} holds {largest}; expected at most {_LARGEST[type_]:g}, which is all of {type_.name}")
    if type_ in _PLAIN:
        return numbers.astype(_PLAIN[type_]).tobytes()
    return gguf.quantize(numbers, type_).tobytes()


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices that together are all rows of a matrix."""
    rows, columns = shape
    step = max(1, _AT_ONCE // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
