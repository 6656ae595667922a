"""Files as torch.save writes them, made without torch, so that one thing in them can be wrong."""

from __future__ import annotations

import pickle
import struct
import zipfile

import numpy as np
import pytest

from cpmjax.formats.torch_files import open_torch
from cpmjax.run.errors import UserError

MAGIC, PROTOCOL, SYSTEM = 0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}
FLOATS = np.arange(4, dtype=np.float32).tobytes()


def write(folder, data, zipped=True, **entries):
    """A file with this pickle of a state dict and one storage, FLOATS; `entries` of the zip file come on top."""
    file = folder / "pytorch_model.bin"
    if not zipped:
        parts = [pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, SYSTEM)]
        parts += [data, pickle.dumps([], 2)]
        file.write_bytes(b"".join(parts))
        return file
    contents = {"data.pkl": data, "byteorder": b"little", "data/0": FLOATS, "version": b"3\n"} | entries
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"archive/{name}", content)
    return file


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def counts(*values) -> bytes:
    return tuple_of(*map(integer, values))


def storage(kind=b"ctorch\nFloatStorage\n", key=text("0"), elements=integer(4), word=text("storage")):
    return tuple_of(word, kind, key, text("cpu"), elements) + b"Q"


def tensor(source=None, offset=integer(0), shape=counts(2, 2), strides=counts(2, 1)):
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = tuple_of(source or storage(), offset, shape, strides, b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def state(value: bytes) -> bytes:
    return b"\x80\x02}" + text("w") + value + b"s."


def old(folder, *parts, storages=b""):
    file = folder / "pytorch_model.bin"
    file.write_bytes(b"".join(part if type(part) is bytes else pickle.dumps(part, 2) for part in parts) + storages)
    return file


def old_tensor(elements=4, view=b"N", shape=counts(2, 2)):
    identity = tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("7"), text("cpu"), integer(elements), view)
    return tensor(identity + b"Q", shape=shape)


def old_state(*arguments, **named):
    return state(old_tensor(*arguments, **named))


SIZE = struct.pack("<Q", 4)


def refused(file, *words):
    with pytest.raises(UserError) as caught:
        open_torch(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "; expected " in message and message.isprintable(), message
    # The name of the file may have the name of the test in it.
    assert all(word in message.removeprefix(str(file)) for word in words), message


def equal(read, expected):
    return read.dtype == expected.dtype and read.shape == expected.shape and read.tobytes() == expected.tobytes()
