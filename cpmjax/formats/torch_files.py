"""What torch.save writes, read without torch: a pickle that describes tensors, and their bytes.

Two layouts: a zip file with the pickle and one stored entry a storage, and before torch 1.6 one stream of five pickles
with the storages behind them. A tensor is a view of a storage with an offset and strides, all counted in elements.
Source: torch/serialization.py and torch/_utils.py of torch 2.13, and the files they write.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cpmjax.formats.pickles import PickleError, read_pickle
from cpmjax.formats.tensors import TensorInfo, Tensors, map_file
from cpmjax.run.errors import UserError

_EXPECTED = "expected what torch.save writes"
_MAX_READ = 4 << 20  # of a pickle, or of the directory of a zip file; those of MiniCPM-2B are under 100 KB
_MAX_DIMENSIONS = 64  # numpy's
_CONTAINERS = ("state_dict", "model", "module")

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_LOCAL_HEADER = struct.Struct("<4s2xHH8x4xIHH")  # signature, flags, method, size, lengths of name and extra field
_ENCRYPTED, _SIZE_FOLLOWS, _UTF8 = 0x41, 0x08, 0x800  # flags
_SIZE_IN_EXTRA = 0xFFFFFFFF


@dataclass(frozen=True)
class _Kind:
    """What torch calls a storage class: the type of its elements."""

    stored: str
    dtype: np.dtype


@dataclass(frozen=True)
class _Storage:
    kind: _Kind
    key: str
    elements: int

    @property
    def size(self) -> int:
        return self.elements * self.kind.dtype.itemsize


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int  # this and the strides are counted in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_torch(path: str | Path) -> Tensors:
    """The state dict in a file of torch.save, also where it is the only thing in a "state_dict", "model" or "module".

    Executes nothing. Raises UserError for a file that is not one, is damaged or incomplete, or holds anything but
    tensors with text for names.
    """
    path = Path(path)
    content = map_file(path, "what torch.save writes")
    try:
        if content[:4].tobytes() == b"PK\x03\x04":
            state, places = _read_zip(path, content)
        else:
            state, places = _read_legacy(content)
        return _TorchFile(path, content, _state_dict(state), places)
    except PickleError as error:
        raise UserError(f"{path}: {error}") from error


class _TorchFile(Tensors):
    def __init__(self, path: Path, content: np.ndarray, views: dict[str, _View], places: dict[str, int]) -> None:
        """`places` are where in the content the storages begin, by key."""
        kinds = {name: view.storage.kind for name, view in views.items()}
        infos = {name: TensorInfo(view.shape, kinds[name].dtype, kinds[name].stored) for name, view in views.items()}
        super().__init__(path, infos)
        self._content = content
        self._views = views
        self._places = places

    def read(self, name: str) -> np.ndarray:
        view = self._views[name]
        dtype = view.storage.kind.dtype
        # Where no step is taken any stride will do, and what the file says may be more than an address can hold.
        strides = tuple(
            stride * dtype.itemsize if size > 1 and 0 not in view.shape else dtype.itemsize
            for stride, size in zip(view.strides, view.shape, strict=True)
        )
        start = self._places[view.storage.key] + view.offset * dtype.itemsize
        return np.ndarray(view.shape, dtype, self._content, start, strides)  # type: ignore[arg-type]


def _state_dict(state: Any) -> dict[str, _View]:
    if type(state) is dict and len(state) == 1:
        [(key, inner)] = state.items()
        if key in _CONTAINERS and type(inner) is dict:
            state = inner
    if type(state) is not dict:
        raise PickleError(f"holds {_describe(state)}; expected a dict of tensors")
    for name, value in state.items():
        if not name.isprintable():
            raise PickleError(f"a tensor is called {ascii(name)[:80]}; expected plain text")
        if not isinstance(value, _View):
            raise PickleError(f"{name[:80]} is {_describe(value)}; expected nothing but tensors")
        _check_extent(name[:80], value)
    return state


def _check_extent(name: str, view: _View) -> None:
    shape, elements = view.shape, view.storage.elements
    reach = view.offset
    if 0 not in shape:
        last = view.offset + sum((size - 1) * stride for size, stride in zip(shape, view.strides, strict=True))
        # The number of elements counts for overlapping views: what is read is never larger than its file.
        reach = max(last + 1, math.prod(shape))
    if reach > elements:
        raise PickleError(
            f"{name} reaches beyond its storage: shape {_short(shape)}, strides {_short(view.strides)}, "
            f"offset {_short(view.offset)}; expected it within {elements} elements"
        )
    if math.prod(size or 1 for size in shape) * view.storage.kind.dtype.itemsize >= 2**63:
        raise PickleError(f"{name} is empty, of shape {_short(shape)}; expected sizes that an array can have")


def _describe(value: Any) -> str:
    kind = {_View: "a tensor", _Storage: "a storage", _Kind: "a class", type(None): "None"}.get(type(value))
    return kind or f"of type {type(value).__name__}"


# What the names in a pickle stand for. Each function gets the arguments as the file has them.


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise PickleError("an OrderedDict made in one call; expected one filled item by item")
    return {}


def _tensor(arguments: tuple[Any, ...]) -> _View:
    """storage, offset, shape, strides, requires_grad, hooks and sometimes metadata, which say nothing of values."""
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Storage):
        raise PickleError("a tensor without a storage, an offset, a shape and strides; expected all four")
    storage, offset, shape, strides = arguments[:4]
    if not (_is_count(offset) and _are_counts(shape) and _are_counts(strides) and len(shape) == len(strides)):
        raise PickleError(f"a tensor in storage {storage.key} with a damaged offset, shape or strides; expected counts")
    return _View(storage, offset, shape, strides)


def _parameter(arguments: tuple[Any, ...]) -> _View:
    if len(arguments) != 3 or not isinstance(arguments[0], _View):
        raise PickleError("a parameter without a tensor; expected one")
    return arguments[0]


def _storage(identity: Any, tail: tuple[Any, ...] = ()) -> _Storage:
    """("storage", class, key, device, elements), and with the legacy layout a None for "no part of another"."""
    if not (
        type(identity) is tuple
        and len(identity) == 5 + len(tail)
        and identity[5:] == tail
        and identity[0] == "storage"
        and isinstance(identity[1], _Kind)
        and type(identity[2]) is str
        and identity[2].isdecimal()
        and len(identity[2]) <= 20
        and _is_count(identity[4])
    ):
        raise PickleError("a storage with a damaged description; expected its type, a number for its key, and its size")
    return _Storage(identity[1], identity[2], identity[4])


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: Any) -> bool:
    return type(values) is tuple and len(values) <= _MAX_DIMENSIONS and all(map(_is_count, values))


def _short(value: Any) -> str:
    return str(value)[:80]


_NAMES: dict[str, Any] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
} | {
    f"torch.{name}Storage": _Kind(f"torch.{np.dtype(dtype).name}", np.dtype(dtype))
    for name, dtype in {
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}


# The two layouts: each gives the value pickled, and where the bytes of every storage in it begin.


def _read_legacy(content: np.ndarray) -> tuple[Any, dict[str, int]]:
    """Magic number, protocol, system, state dict and keys, each a pickle; then per key the elements and their bytes."""
    stream = io.BytesIO(content[:_MAX_READ].tobytes())
    storages: dict[str, _Storage] = {}

    def storage(identity: Any) -> _Storage:
        found = _storage(identity, tail=(None,))
        if storages.setdefault(found.key, found) != found:
            raise PickleError(f"storage {found.key} has two types or sizes; expected one")
        return found

    def read() -> Any:
        return read_pickle(stream, _NAMES, storage)

    if read() != _LEGACY_MAGIC or read() != _LEGACY_PROTOCOL:
        raise PickleError(f"neither a zip file nor the pickles of older versions of torch; {_EXPECTED}")
    system = read()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise PickleError("its numbers are not little-endian; expected the file of a little-endian machine")
    state, keys = read(), read()
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise PickleError(f"its list of storages is not the storages of its tensors; {_EXPECTED}")

    places, at = {}, stream.tell()
    for key in keys:
        elements = int.from_bytes(content[at : at + 8].tobytes(), "little")
        places[key] = at + 8
        at = at + 8 + storages[key].size
        if elements != storages[key].elements or at > len(content):
            raise PickleError(f"storage {key} is not {storages[key].size} bytes; expected as many as its tensors say")
    if at != len(content):
        raise PickleError(f"{len(content) - at} bytes behind the last storage; expected none")
    return state, places


def _read_zip(path: Path, content: np.ndarray) -> tuple[Any, dict[str, int]]:
    """data.pkl, and every storage an entry data/KEY beside it."""
    entries = _stored_entries(path, content)

    def read(name: str) -> bytes:
        start, size = entries[name]
        return content[start : start + min(size, _MAX_READ)].tobytes()

    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise PickleError(f"a zip file with {len(roots)} entries called data.pkl; {_EXPECTED}")
    [root] = roots
    if root + "byteorder" in entries and read(root + "byteorder") != b"little":
        raise PickleError("its numbers are not little-endian; expected the file of a little-endian machine")
    places: dict[str, int] = {}

    def storage(identity: Any) -> _Storage:
        found = _storage(identity)
        entry = f"{root}data/{found.key}"
        if entry not in entries:
            raise PickleError(f"{entry} is missing; expected an entry for every storage")
        start, size = entries[entry]
        if size != found.size:
            raise PickleError(f"{entry} has {size} bytes; expected {_short(found.size)}, as its tensors say")
        places[found.key] = start
        return found

    return read_pickle(io.BytesIO(read(root + "data.pkl")), _NAMES, storage), places


def _stored_entries(path: Path, content: np.ndarray) -> dict[str, tuple[int, int]]:
    """Name -> start and size of its bytes; the directory of the zip file agrees with what stands before each entry."""
    try:
        with _Frugal(path) as file, zipfile.ZipFile(file) as archive:
            directory, limit = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise PickleError(f"a damaged or incomplete zip file; {_EXPECTED}") from error
    entries: dict[str, tuple[int, int]] = {}
    for entry in directory:
        name = entry.orig_filename
        if not name.isprintable() or name in entries:
            raise PickleError(f"its entry {ascii(name)[:80]} is there twice, or is no plain text; {_EXPECTED}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise PickleError(
                f"its entry {name[:80]} is compressed or encrypted; expected it stored, as torch.save does"
            )
        entries[name] = (_start(entry, content, limit), entry.file_size)
    return entries


class _Frugal(io.FileIO):
    """A file for zipfile, which reads a directory of any size in one go."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_READ:
            raise zipfile.BadZipFile
        return super().read(size)


def _start(entry: zipfile.ZipInfo, content: np.ndarray, limit: int) -> int:
    """Where the bytes of an entry begin; they end before `limit`."""
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
    at = entry.header_offset + _LOCAL_HEADER.size
    if entry.header_offset >= 0 and at <= limit:
        signature, flags, method, size, name_size, extra_size = _LOCAL_HEADER.unpack_from(
            content.data, entry.header_offset
        )
        start = at + name_size + extra_size
        sizes = (entry.file_size, _SIZE_IN_EXTRA, 0 if flags & _SIZE_FOLLOWS else entry.file_size)
        if (
            signature == b"PK\x03\x04"
            and flags == entry.flag_bits
            and method == entry.compress_type
            and size in sizes
            and content[at : at + name_size].tobytes() == name
            and entry.compress_size == entry.file_size <= limit - start
        ):
            return start
    raise PickleError(f"its entry {entry.orig_filename[:80]} is not where the zip file says; {_EXPECTED}")
