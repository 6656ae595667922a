"""Damages real files in every way it can think of, and looks at what the readers of weights make of them.

    python experiments/benchmarks/fuzz_readers.py [--mutants 100000] [--seed 0] [--findings fuzz-findings]

Each mutant of a small file is opened and all of its tensors are read. A reader may accept it, if the tensors are what
it said they are, or refuse it with a UserError of one line that names the file, within a second and with no more memory
than twice the file and a little. Anything else is a finding: its mutant is kept, and the exit code is 1.
From half a minute to five minutes per reader and 100,000 mutants on 1 CPU core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import pickle
import pickletools
import random
import re
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as GgmlType

from cpmjax.formats import gguf_model
from cpmjax.formats.config_files import read_config
from cpmjax.formats.gguf_files import open_gguf, write_gguf
from cpmjax.formats.gguf_vocabulary import vocabulary_metadata
from cpmjax.formats.safetensors_files import open_safetensors
from cpmjax.formats.shards import INDEX, open_sharded, write_sharded
from cpmjax.formats.tensors import TensorInfo, Tensors
from cpmjax.formats.tokenizer_files import read_tokenizer
from cpmjax.formats.torch_files import open_torch
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
_HISTORY = "minicpm-tiny-history"

_SECONDS = 1.0  # of CPU time, a mutant
_MEMORY_EVERY = 20  # mutants: tracing memory is slow
_MEMORY_BESIDES = 1 << 20  # bytes, what opening any file takes

Mutate = Callable[[bytes, random.Random], bytes]
Folder = dict[str, bytes]  # the content of files by name


@dataclass(frozen=True)
class Reader:
    name: str
    samples: Callable[[], Sequence[bytes]]
    open: Callable[[Path], object]
    # Damages what the file says of itself and keeps the file around it whole, so that the damage is reached.
    inside: Mutate | None = None
    file: str = "mutant"  # how the damaged file is called
    beside: Callable[[], Folder] = dict  # files that lie beside it, whole


@dataclass
class Report:
    accepted: int = 0
    refused: int = 0
    findings: list[tuple[str, bytes]] = field(default_factory=list)  # what was wrong, and the mutant
    slowest: float = 0.0  # seconds of CPU time


def fuzz(reader: Reader, mutants: int, seed: int) -> Report:
    """Opens and reads that many mutants of the reader's samples; the same seed gives the same ones."""
    draw = random.Random(seed)
    samples = reader.samples()
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / reader.file
        for name, content in reader.beside().items():
            path.with_name(name).write_bytes(content)
        for number in range(mutants):
            sample = draw.choice(samples)
            if reader.inside and draw.random() < 0.5:
                mutant = reader.inside(sample, draw)
            else:
                mutant = mutate(sample, draw, draw.choice(samples))
            path.write_bytes(mutant)
            wrong = _try(reader, path, len(mutant), number % _MEMORY_EVERY == 0, report)
            if wrong:
                report.findings.append((wrong, mutant))
    return report


def _try(reader: Reader, path: Path, size: int, traced: bool, report: Report) -> str | None:
    """What is wrong with what the reader did, if anything is."""
    if traced:
        tracemalloc.start()
    began = time.process_time()
    try:
        wrong = _read(reader, path, report)
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - began
    report.slowest = max(report.slowest, seconds)
    if traced:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        if peak > 2 * size + _MEMORY_BESIDES:
            return f"{peak} bytes of memory for a file of {size}"
    return f"{seconds:.1f} s" if seconds > _SECONDS else wrong


def _read(reader: Reader, path: Path, report: Report) -> str | None:
    try:
        tensors = reader.open(path)
        for name, info in tensors.items() if isinstance(tensors, Tensors) else ():
            array = tensors.read(name)
            if (array.shape, array.dtype) != (info.shape, info.dtype):
                return f"{name}: {array.dtype} {array.shape} where {info.dtype} {info.shape} was said"
            array.tobytes()  # touches all of it
    except UserError as error:
        message = str(error)
        # Where several files must agree, another of them may be the one that does not.
        named = message.startswith(tuple(f"{file}{end}" for file in path.parent.iterdir() for end in (": ", " with ")))
        if not named or not message.isprintable():
            return f"a message that is not one line about the file: {message!r}"
        report.refused += 1
        return None
    report.accepted += 1
    return None


def mutate(data: bytes, draw: random.Random, other: bytes = b"") -> bytes:
    """The data with one to three damages; splices take from the `other`."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        data = draw.choice(_DAMAGES)(bytearray(data), draw, other or data)
    return data


def _flip_bits(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    for _ in range(draw.choice((1, 1, 2, 8)) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def _overwrite(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    at, size = draw.randrange(len(data) + 1), draw.randrange(1, 17)
    data[at : at + size] = draw.randbytes(size) if draw.random() < 0.5 else draw.randbytes(1) * size
    return bytes(data)


def _truncate(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    return bytes(data[: draw.randrange(len(data) + 1)])


def _remove(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    del data[at : at + draw.randrange(1, 33)]
    return bytes(data)


def _insert(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    at = draw.randrange(len(data) + 1)
    data[at:at] = draw.randbytes(draw.randrange(1, 17))
    return bytes(data)


def _splice(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    at, source, size = draw.randrange(len(data) + 1), draw.randrange(len(other) + 1), draw.randrange(1, 257)
    # As often as not the length stays, and with it every offset behind.
    data[at : at + size * draw.randrange(2)] = other[source : source + size]
    return bytes(data)


def _set_integer(data: bytearray, draw: random.Random, other: bytes) -> bytes:
    at, size = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 8))
    value = draw.choice((0, 1, len(data), 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))
    data[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(data)


_DAMAGES = (_flip_bits, _overwrite, _truncate, _remove, _insert, _splice, _set_integer)


def damage_safetensors_header(data: bytes, draw: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    header = draw.choice((mutate, _damage_json))(header, draw)
    return len(header).to_bytes(8, "little") + header + tensors


_LEGACY_PICKLES = 5  # at the beginning of a file

_JSON_VALUES = [b"0", b"1", b"-1", b"2147483648", b"1152921504606846976", b"18446744073709551615", b"1e400", b"1.0"]
_JSON_VALUES += [b"NaN", b"true", b"null", b'"F32"', b'"BF16"', b'"__metadata__"', b"[]", b"{}", b"[" * 2000]


def _damage_json(text: bytes, draw: random.Random) -> bytes:
    """One value, or one character of the structure, becomes another: any, or one of the same kind from elsewhere."""
    words = list(re.finditer(rb'(\d+)|("[^"]*")|[\[\]{}:,]', text))
    place = draw.choice(words)
    value = draw.choice(_JSON_VALUES)
    if draw.random() < 0.5:
        value = draw.choice([word for word in words if word.lastindex == place.lastindex])[0]
    return text[: place.start()] + value + text[place.end() :]


def damage_zipped_pickle(data: bytes, draw: random.Random) -> bytes:
    """The same entries, stored, with a damaged data.pkl."""
    damaged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(damaged, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = draw.choice((mutate, damage_pickles))(content, draw)
            new.writestr(entry.filename, content)
    return damaged.getvalue()


def damage_pickles(data: bytes, draw: random.Random) -> bytes:
    """Of the pickles that the data begins with, one instruction or two become a number or another instruction."""
    for _ in range(draw.choice((1, 2))):
        stream, places = io.BytesIO(data), []
        with contextlib.suppress(ValueError):  # where the pickles end, or at a damage
            for _ in range(_LEGACY_PICKLES):
                places += [place for _, _, place in pickletools.genops(stream)]
        spans = list(itertools.pairwise(places))
        start, end = draw.choice(spans)
        other = data[slice(*draw.choice(spans))]
        number = pickle.dumps(draw.choice((0, 1, 5, -1, 2**31, 2**32, 2**40, 2**63, 2**64, 2**200)), protocol=2)[2:-1]
        data = data[:start] + draw.choice((number, number, other, b"")) + data[end:]
    return data


def _golden(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(GOLDEN / name).read_bytes() for name in names]


def _written(write: Callable[[Path], object]) -> Folder:
    """What a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _shards() -> Folder:
    arrays = {name: np.arange(6, dtype=np.float32).reshape(2, 3) for name in ("one", "two", "three")}
    infos = {name: TensorInfo(array.shape, array.dtype, "F32") for name, array in arrays.items()}
    return _written(lambda folder: write_sharded(folder, infos, arrays.values(), max_shard_bytes=48))


def _gguf(metadata: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], GgmlType]]) -> bytes:
    arrays = (np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for shape, _ in shapes.values())
    metadata = {"general.architecture": "minicpm", **metadata}
    [content] = _written(lambda folder: write_gguf(folder / "gguf", metadata, shapes, arrays)).values()
    return content


def _gguf_tensors() -> list[bytes]:
    """One file of every type that we write, and one with an array of each kind in its metadata."""
    types = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_0)
    words: dict[str, Any] = {
        "text": ["a", "bc"],
        "yes": np.array([True, False]),
        "numbers": np.arange(3, dtype=np.int64),
    }
    return [_gguf({"a": 1}, {"v": ((3,), GgmlType.F32), "m": ((2, 64), type_)}) for type_ in types] + [_gguf(words, {})]


def _gguf_models() -> list[bytes]:
    """The shape of a small model and its vocabulary, as a file of llama.cpp has them."""
    config = ModelConfig(vocabulary=512, width=32, layers=2, heads=2, feed_forward=64, dim_model_base=16)
    model = (GOLDEN / _HISTORY / "tokenizer.model").read_bytes()
    embedding = {"token_embd.weight": ((512, 32), GgmlType.Q4_0)}
    metadata = gguf_model.model_metadata(config, "small")
    return [_gguf(metadata | vocabulary_metadata(model, 512, {}, space, None), embedding) for space in (True, False)]


def _open_gguf_model(path: Path) -> Tensors:
    file = open_gguf(path)
    gguf_model.read_config(file)
    gguf_model.read_tokenizer(file)
    return file


READERS = (
    Reader("safetensors", _golden("torch/expected.safetensors"), open_safetensors, damage_safetensors_header),
    Reader("torch, zip", _golden("torch/zip.bin", "torch/zip_protocol4.bin"), open_torch, damage_zipped_pickle),
    Reader(
        "torch, legacy",
        _golden("torch/legacy.bin", "torch/legacy_protocol4.bin"),
        open_torch,
        damage_pickles,
    ),
    Reader("sharded index", lambda: [_shards()[INDEX]], open_sharded, _damage_json, INDEX, _shards),
    Reader("gguf", _gguf_tensors, open_gguf),
    Reader("gguf, model", _gguf_models, _open_gguf_model),
    Reader(
        "config.json",
        _golden(f"{_HISTORY}/config.json", "minicpm-tiny-gqa/config.json"),
        lambda path: read_config(path, None),
        _damage_json,
    ),
    Reader(
        "tokenizer.model",
        _golden(f"{_HISTORY}/tokenizer.model"),
        lambda path: read_tokenizer(path.parent),
        file="tokenizer.model",
    ),
    Reader(
        "tokenizer json",
        _golden(f"{_HISTORY}/tokenizer_config.json"),
        lambda path: read_tokenizer(path.parent),
        _damage_json,
        "tokenizer_config.json",
        lambda: {"tokenizer.model": (GOLDEN / _HISTORY / "tokenizer.model").read_bytes()},
    ),
)


def main(mutants: int, seed: int, findings: Path) -> int:
    print(f"{'reader':16}{'mutants':>10}{'accepted':>10}{'refused':>10}{'findings':>10}{'slowest':>10}", flush=True)
    found = 0
    for reader in READERS:
        report = fuzz(reader, mutants, seed)
        counts = (mutants, report.accepted, report.refused, len(report.findings))
        print(f"{reader.name:16}{''.join(f'{count:10,}' for count in counts)}{report.slowest:8.3f} s", flush=True)
        for number, (wrong, mutant) in enumerate(report.findings):
            findings.mkdir(parents=True, exist_ok=True)
            file = findings / f"{reader.name.replace(', ', '-')}-{seed}-{number}"
            file.write_bytes(mutant)
            print(f"  {file}: {wrong}")
        found += len(report.findings)
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where their mutants are kept")
    options = parser.parse_args()
    sys.exit(main(options.mutants, options.seed, options.findings))
