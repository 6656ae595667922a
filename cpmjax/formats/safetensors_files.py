"""safetensors files: a length, a JSON header that says where each tensor lies, and the tensors without a gap.

Reading maps the file and checks all of its header first; writing takes one tensor at a time.
Source: the format's description in github.com/huggingface/safetensors (README), whose library refuses the same files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cpmjax.formats.tensors import TensorInfo, Tensors, map_file
from cpmjax.run.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_EXPECTED = "expected a safetensors file"
_METADATA = "__metadata__"
_ALIGNMENT = 8
_MAX_HEADER = 16 << 20  # over 100,000 tensors; parsed, a header takes up to 20 times its size
_MAX_DIMENSIONS = 64  # numpy's


def open_safetensors(path: str | Path) -> Tensors:
    """The tensors of a .safetensors file. Raises UserError for a header that is not true to the file or the format."""
    path = Path(path)
    content = map_file(path, "a safetensors file")
    header_size = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or header_size > min(len(content) - 8, _MAX_HEADER):
        raise UserError(
            f"{path}: {len(content)} bytes with a header of {header_size}; {_EXPECTED}, whole, "
            f"with a header of at most {_MAX_HEADER}"
        )
    start = 8 + header_size
    header = _parse_header(path, content[8:start].tobytes())
    metadata = header.pop(_METADATA, {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise UserError(f"{path}: {_METADATA} is not text by name; {_EXPECTED}")
    infos, offsets = {}, {}
    for name, entry in header.items():
        infos[name], offsets[name] = _parse_entry(path, name, entry)
    _check_gapless(path, offsets, len(content) - start)
    return _SafetensorsFile(path, infos, content, {name: start + begin for name, (begin, _) in offsets.items()})


class _SafetensorsFile(Tensors):
    def __init__(self, path: Path, infos: dict[str, TensorInfo], content: np.ndarray, places: dict[str, int]) -> None:
        super().__init__(path, infos)
        self._content = content
        self._places = places

    def read(self, name: str) -> np.ndarray:
        info = self[name]
        return np.ndarray(info.shape, info.dtype, self._content, self._places[name])  # type: ignore[arg-type]


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) < len(pairs):
            raise ValueError("a name that occurs twice")
        return items

    try:
        if not text.startswith(b"{"):
            raise ValueError("no JSON object")
        return json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"{path}: a header that cannot be read as JSON ({reason}); {_EXPECTED}") from error


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """What the header says of one tensor: the tensor, and where its bytes begin and end."""
    if not name.isprintable():
        raise UserError(f"{path}: a tensor is called {ascii(name)[:80]}; expected plain text")
    where = f"{path}: {name[:80]}"
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where}: its header is not a dtype, a shape and data_offsets; {_EXPECTED}")
    stored, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(stored) is not str or stored not in DTYPES:
        raise UserError(f"{where}: dtype {ascii(stored)[:80]} is unknown; expected one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise UserError(f"{where}: its shape is {ascii(shape)[:80]}; expected at most {_MAX_DIMENSIONS} counts")
    dtype = DTYPES[stored]
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
        raise UserError(f"{where}: its shape is {str(shape)[:80]}; expected sizes that an array can have")
    size = math.prod(shape) * dtype.itemsize
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise UserError(f"{where}: its data_offsets are {ascii(offsets)[:80]}; expected {size} bytes for its shape")
    return TensorInfo(tuple(shape), dtype, stored), (offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return type(values) is list and all(type(value) is int and value >= 0 for value in values)


def _check_gapless(path: Path, offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    at = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != at or end > size:
            raise UserError(
                f"{path}: {name[:80]} lies at {str(begin)[:80]} of {size} bytes; "
                f"expected it at {at}, where the tensor before it ends, and within the file"
            )
        at = end
    if at != size:
        raise UserError(f"{path}: the tensors end at {at} of {size} bytes; expected them to fill the file")


def write_safetensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Writes the arrays, which come in the order of `infos`, one at a time; all are on the disk when it returns.

    In the file larger elements come first, so that each tensor is aligned. transformers wants `metadata` as it is.
    Raises ValueError if an array is not what `infos` says, or has a dtype that the format cannot hold, or if there are
    more or fewer.
    """
    spellings = {dtype: stored for stored, dtype in DTYPES.items()}
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    at = 0
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        if info.dtype not in spellings:
            raise ValueError(f"{name}: {info.dtype} cannot be written; expected one of {', '.join(DTYPES)}")
        end = at + tensor_bytes(info)
        header[name] = {"dtype": spellings[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, info), array in zip(infos.items(), arrays, strict=True):
            if array.shape != info.shape or array.dtype != info.dtype:
                raise ValueError(f"{name}: {array.dtype} {array.shape}; expected {info.dtype} {info.shape}")
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def tensor_bytes(info: TensorInfo) -> int:
    """What a tensor takes in a file."""
    return math.prod(info.shape) * info.dtype.itemsize
