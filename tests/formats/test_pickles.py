"""Pickles and zip files made to harm, or damaged in one place."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch_by_hand import (
    FLOATS,
    counts,
    equal,
    integer,
    refused,
    state,
    storage,
    tensor,
    text,
    tuple_of,
    write,
)

from cpmjax.formats.torch_files import open_torch

ROOT = Path(__file__).parents[2]


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_the_pickle_written_by_hand_is_read(tmp_path):
    # Or what is refused below could be refused for another reason.
    read = open_torch(write(tmp_path, state(tensor()))).read("w")
    assert equal(read, np.arange(4, dtype=np.float32).reshape(2, 2))


@pytest.mark.parametrize("rest", [b"N", b"("])
def test_something_left_on_the_stack(tmp_path, rest):
    refused(write(tmp_path, b"\x80\x02" + rest + state(tensor())[2:]), "incomplete")


def test_what_lies_below_a_mark_is_not_taken(tmp_path):
    refused(write(tmp_path, b"\x80\x02}" + text("w") + tensor() + b"(su."), "incomplete")


@pytest.mark.parametrize("offset", [0, 4])
def test_strides_of_an_empty_tensor_say_nothing(tmp_path, offset):
    empty = tensor(offset=integer(offset), shape=counts(0, 5), strides=counts(2**64, 2**64))
    assert open_torch(write(tmp_path, state(empty))).read("w").shape == (0, 5)


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_called(tmp_path, protocol, zipped):
    trace = tmp_path / "trace"
    for name, *call in [("system", os.system, f"touch {trace}"), ("eval", eval, f"open({str(trace)!r}, 'w')")]:
        data = pickle.dumps({"w": Evil(call[0], tuple(call[1:]))}, protocol)
        named = f".{name}" if protocol else ""  # protocol 0 is refused before the name
        refused(write(tmp_path, data, zipped), named)
        (tmp_path / "plain.bin").write_bytes(data)
        refused(tmp_path / "plain.bin", named)
        assert not trace.exists()
        pickle.loads(data)  # shows that it would have
        assert trace.exists()
        trace.unlink()


DAMAGED = {
    "negative offset": (tensor(offset=integer(-1)), "counts"),
    "negative stride": (tensor(strides=counts(-2, 1)), "counts"),
    "negative size": (tensor(shape=counts(-2, 2)), "counts"),
    "size is a bool": (tensor(shape=tuple_of(b"\x88", b"\x88")), "counts"),
    "size is a text": (tensor(shape=tuple_of(text("2"), text("2"))), "counts"),
    "shape is a list": (tensor(shape=b"]"), "counts"),
    "fewer strides": (tensor(strides=counts(1)), "counts"),
    "offset behind the end": (tensor(offset=integer(1)), "w reaches beyond its storage", "within 4"),
    "stride beyond the end": (tensor(strides=counts(3, 1)), "w reaches beyond its storage"),
    "stride beyond all addresses": (tensor(strides=counts(2**64, 2**64)), "w reaches beyond"),
    "empty and behind the end": (tensor(offset=integer(5), shape=counts(0), strides=counts(1)), "w reaches beyond"),
    "one element many times": (tensor(shape=counts(2**40), strides=counts(0)), "w reaches beyond"),
    "empty and too large": (tensor(shape=counts(0, 2**62, 4), strides=counts(0, 0, 0)), "w is empty"),
    "65 dimensions": (tensor(shape=counts(*[1] * 65), strides=counts(*[1] * 65)), "counts"),
    "no storage": (tensor(source=b"N"), "without a storage"),
    "two arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n" + counts(1, 2) + b"R", "without a storage"),
    "parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n" + counts(1, 2, 3) + b"R", "parameter"),
    "key leads out": (tensor(storage(key=text("../version"))), "damaged description"),
    "key is in another script": (tensor(storage(key=text("٠"))), "archive/data/"),
    "key is absent": (tensor(storage(key=text("1"))), "archive/data/1 is missing"),
    "key is a number": (tensor(storage(key=integer(0))), "damaged description"),
    "key of 21 digits": (tensor(storage(key=text("0" * 21))), "damaged description"),
    "id of four parts": (
        tensor(tuple_of(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu")) + b"Q"),
        "damaged description",
    ),
    "other word": (tensor(storage(word=text("module"))), "damaged description"),
    "other id": (tensor(integer(7) + b"Q"), "damaged description"),
    "type is a text": (tensor(storage(kind=text("FloatStorage"))), "damaged description"),
    "type is a function": (tensor(storage(kind=b"ctorch._utils\n_rebuild_parameter\n")), "damaged description"),
    "unknown type": (tensor(storage(kind=b"ctorch\nComplexFloatStorage\n")), "torch.ComplexFloatStorage"),
    "more elements": (tensor(storage(elements=integer(2**62))), "archive/data/0 has 16 bytes"),
    "fewer elements": (tensor(storage(elements=integer(3))), "archive/data/0 has 16 bytes"),
    "negative elements": (tensor(storage(elements=integer(-4))), "damaged description"),
    "OrderedDict of items": (b"ccollections\nOrderedDict\n" + tuple_of(b"]") + b"R", "OrderedDict"),
    "call of a dict": (b"}" + b")R", "a call of"),
    "call of a class": (b"ctorch\nFloatStorage\n" + b")R", "a call of"),
    "arguments are a list": (b"ccollections\nOrderedDict\n" + b"]R", "call"),
    "attributes of a tensor": (tensor() + b"}" + text("_content") + b"NsbN0", "attributes of"),
    "attributes of a function": (b"ccollections\nOrderedDict\n" + b"}" + text("__code__") + b"Nsb", "attributes of"),
    "an extension": (b"\x82\x01", "EXT1"),
    "an object": (b"ccollections\nOrderedDict\n" + b")\x81", "NEWOBJ"),
    "an instance": (b"(iposix\nsystem\n", "INST"),
    "a key that is a tuple": (b"}" + counts(1) + b"Ns", "key is tuple"),
    "a name of two lines": (tensor() + b"s" + text("a\nb") + tensor(), "a\\nb"),
    "items of a list": (b"]" + text("a") + b"Ns", "items or attributes of"),
    "nothing in the memo": (b"h\x07", "pickle"),
    "nothing on the stack": (b"00000", "POP"),
    "no mark": (b"t", "pickle"),
    "a mark too many": (b"(", "pickle"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pickles(tmp_path, case):
    value, *words = DAMAGED[case]
    refused(write(tmp_path, state(value)), *words)


LIMITED = """
import pickle, resource, sys, time
from pathlib import Path
from cpmjax.formats.torch_files import open_torch
from cpmjax.run.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    pickle.loads(b"\\x80\\x02Nr\\xff\\xff\\xff\\xff.")
    print("the limit does not hold")
except MemoryError:
    pass
for file in sys.argv[1:]:
    began = time.process_time()
    try:
        open_torch(file)
        print(file, "was accepted")
    except UserError:
        pass
    if time.process_time() - began > 1:
        print(file, "took too long")
"""


def doubled(times: int, end: bytes) -> bytes:
    """A tuple of itself twice, again and again: 2^times leaves."""
    steps = b"".join(b"q\x00h\x00\x86" for _ in range(times))
    return b"\x80\x02N" + steps + end


HUGE = {
    "memo index": b"\x80\x02Nr\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    "text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fN.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xffN.",
    "bytes": b"\x80\x04\x8e" + b"\xff" * 6 + b"\x00\x00N.",
    "bytearray": b"\x80\x05\x96" + b"\xff" * 6 + b"\x00\x00N.",
    "integer": b"\x80\x02\x8b\xff\xff\xff\x7fN.",
    "digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "tuples as a value": doubled(60, b"."),
    "tuples as a key": b"\x80\x02}" + doubled(60, b"Ns.")[2:],
    "tuples as a name": doubled(60, b"h\x00\x93."),
    "tuples as an id": doubled(60, b"Q."),
    "tuples as arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + doubled(60, b"R.")[2:],
    "tuples in tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "lists in themselves": b"\x80\x02]q\x00" + b"h\x00a" * 1000 + b".",
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures memory with /proc")
def test_nothing_large_is_allocated(tmp_path):
    files = []
    for case, data in HUGE.items():
        for zipped in (True, False):
            files.append(tmp_path / f"{case}-{zipped}")
            write(tmp_path, data, zipped).rename(files[-1])
            refused(files[-1])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, files)], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_directory_over_the_limit_is_refused(tmp_path):
    file = write(tmp_path, state(tensor()))
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(80):
            entry = zipfile.ZipInfo(f"archive/{number}")
            entry.comment = bytes(60_000)
            archive.writestr(entry, b"")
    refused(file, "zip file")


def test_a_pickle_over_the_limit_is_refused(tmp_path):
    def with_note(size):
        note = b"}" + text("note") + text("x" * size) + b"sb."
        return b"\x80\x02}" + text("w") + tensor() + b"s" + note

    assert list(open_torch(write(tmp_path, with_note(3 << 20)))) == ["w"]
    refused(write(tmp_path, with_note(4 << 20)), "incomplete")


def test_attributes_of_an_ordered_dict_are_dropped(tmp_path):
    attributes = b"}" + text("_metadata") + b"}s" + text("clear") + b"Nsb"
    data = b"\x80\x02ccollections\nOrderedDict\n)R" + text("w") + tensor() + b"s" + b"}" + attributes[1:] + b"."
    assert list(open_torch(write(tmp_path, data))) == ["w"]


# Zip files.


def altered(file, change):
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)
    return file


def local(data, name: bytes) -> int:
    """Where the local header of an entry begins; its name stands there first."""
    return data.index(name) - 30


def central(data, name: bytes) -> int:
    return data.rindex(name) - 46


def put(at, value):
    return lambda data: data.__setitem__(slice(at(data), at(data) + len(value)), value)


ENTRY = b"archive/data/0"
ZIPS = {
    "compressed": (put(lambda data: central(data, ENTRY) + 10, b"\x08\x00"), "archive/data/0", "stored"),
    "encrypted": (put(lambda data: central(data, ENTRY) + 8, b"\x01\x00"), "archive/data/0", "stored"),
    "another name before the entry": (put(lambda data: local(data, ENTRY) + 30, b"archive/data/1"), "not where"),
    "another method before the entry": (put(lambda data: local(data, ENTRY) + 8, b"\x08"), "not where"),
    "another size before the entry": (put(lambda data: local(data, ENTRY) + 22, b"\x0f"), "not where"),
    "other flags before the entry": (put(lambda data: local(data, ENTRY) + 6, b"\x01"), "not where"),
    "no signature": (put(lambda data: local(data, ENTRY), b"PK\x05\x05"), "not where"),
    "extra field of 64 KB": (put(lambda data: local(data, ENTRY) + 28, b"\xff\xff"), "not where"),
    "size beyond the file": (put(lambda data: central(data, ENTRY) + 20, b"\xff\xff\xff\x0f" * 2), "not where"),
    "size beyond the directory": (put(lambda data: central(data, ENTRY) + 20, b"\x00\x01\x00\x00" * 2), "not where"),
    "two sizes": (put(lambda data: central(data, ENTRY) + 24, b"\x0f"), "not where"),
    "offset beyond the file": (put(lambda data: central(data, ENTRY) + 42, b"\xff\xff\xff\x7f"), "not where"),
    "offset of another entry": (put(lambda data: central(data, ENTRY) + 42, b"\x00\x00\x00\x00"), "not where"),
    "no directory": (lambda data: data.__delitem__(slice(-30, None)), "damaged or incomplete zip"),
    "half a file": (lambda data: data.__delitem__(slice(len(data) // 2, None)), "damaged or incomplete zip"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_damaged_zip_files(tmp_path, case):
    change, *words = ZIPS[case]
    refused(altered(write(tmp_path, state(tensor())), change), *words)


def test_entries_of_the_same_name(tmp_path):
    file = write(tmp_path, state(tensor()))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("archive/data/0", FLOATS)
    refused(file, "archive/data/0", "twice")


def test_compressed_as_zip_programs_do(tmp_path):
    file = tmp_path / "a.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", state(tensor()))
    refused(file, "archive/data.pkl", "compressed")


def test_other_zip_files(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    refused(tmp_path / "a.npz", "0 entries called data.pkl")
    refused(write(tmp_path, state(tensor()), **{"inner/data.pkl": b"N."}), "2 entries called data.pkl")
    refused(write(tmp_path, state(tensor()), byteorder=b"big"), "little-endian")


def test_sizes_of_64_bits(tmp_path, monkeypatch):
    # Files over 4 GB keep sizes and offsets in extra fields; here they begin at 10 bytes.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    file = write(tmp_path, state(tensor()))
    assert b"\xff\xff\xff\xff" in file.read_bytes()
    assert equal(open_torch(file).read("w"), np.arange(4, dtype=np.float32).reshape(2, 2))
