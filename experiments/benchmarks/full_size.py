"""Conversions of a MiniCPM-2B with random weights beside a plain copy of its file: seconds, memory, bytes.

    python experiments/benchmarks/full_size.py FOLDER [--rounds 3] [--preset minicpm-2b]

Makes the model in FOLDER if it is not there yet, as pytorch_model.bin and as model.safetensors (5.45 GB each). Then it
measures, each in a process of its own: `cp`, and `python -m cpmjax.convert` to every format and from it. Before each,
the pages of the source are evicted from the cache; the clock stops when every byte of the product is on the disk
(fsync), of the copy too. An import is whole only after what was written was read again and compared: that is in its
time, and a copy does nothing like it. Memory is the anonymous memory of the process and its children, looked at every
50 ms. Products are deleted, 30 GB of disk are enough. One line of JSON a measurement. About four minutes a round on
2 CPU cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch_by_hand as by_hand
from measured import sample, say

from cpmjax.formats.config_files import write_config
from cpmjax.formats.names import places
from cpmjax.formats.safetensors_files import write_safetensors
from cpmjax.formats.torch_files import open_torch
from cpmjax.model.presets import PRESETS
from cpmjax.model.weights import BFLOAT16
from cpmjax.run.config import ModelConfig

_ALIGNMENT = 64  # of storages, as torch.save aligns them
_LOCAL_HEADER = 30  # bytes of a zip entry's header, without its name and its extra field
_AT_ONCE = 2**24  # numbers that are drawn together
_EVERY = 0.05  # seconds between two looks at memory

# name: (source, target, flags of the conversion), in this order: later ones convert what earlier ones made
CONVERSIONS = {
    "bin -> run": ("bin", "run", ["--to=run"]),
    "safetensors -> run": ("safetensors", "run-2", ["--to=run"]),
    "run -> hf": ("run", "hf", ["--to=hf"]),
    "run -> llama": ("run", "llama", ["--to=llama"]),
    "run -> gguf, q8_0": ("run", "q8_0.gguf", ["--to=gguf", "--quant=q8_0"]),
    "run -> gguf, bf16": ("run", "bf16.gguf", ["--to=gguf"]),
    "gguf -> run": ("bf16.gguf", "run-3", ["--to=run"]),
}
_AGAIN = {source for source, _, _ in CONVERSIONS.values()}


def make(folder: Path, config: ModelConfig) -> None:
    """The same weights in FOLDER/bin and FOLDER/safetensors, whole or absent."""
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    for kind in ("bin", "safetensors"):
        (partial / kind).mkdir(parents=True)
        write_config(partial / kind / "config.json", config, BFLOAT16, llama=False, bos=1, eos=2)
    file = partial / "bin" / "pytorch_model.bin"
    _write_torch(file, {place.name: place.shape for place in places(config, "huggingface")})
    tensors = open_torch(file)
    write_safetensors(
        partial / "safetensors" / "model.safetensors", dict(tensors), (tensors.read(name) for name in tensors)
    )
    for kind in ("bin", "safetensors"):
        os.replace(partial / kind, folder / kind)
    partial.rmdir()


def _write_torch(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """What torch.save makes of a bfloat16 state dict, drawn and written a piece at a time."""
    draw = np.random.default_rng(0)
    state = b"".join(
        by_hand.text(name) + _tensor(str(number), shape) + b"s" for number, (name, shape) in enumerate(shapes.items())
    )
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + state + b".")
        archive.writestr("archive/byteorder", b"little")
        for number, shape in enumerate(shapes.values()):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            # A field that says nothing moves the storage to where it is aligned.
            before = file.tell() + _LOCAL_HEADER + len(entry.filename) + 4
            padding = -before % _ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            entry.file_size = int(np.prod(shape)) * BFLOAT16.itemsize
            with archive.open(entry, "w") as storage:
                for numbers in _random(draw, int(np.prod(shape))):
                    storage.write(numbers.view(np.uint8).data)
        archive.writestr("archive/version", b"3\n")
    _open_and(path, os.fsync)  # only pages that are on the disk can be evicted


def _tensor(key: str, shape: tuple[int, ...]) -> bytes:
    size, strides = int(np.prod(shape)), (*shape[1:], 1)
    kind = b"ctorch\nBFloat16Storage\n"
    storage = by_hand.storage(kind, by_hand.text(key), by_hand.integer(size))
    return by_hand.tensor(storage, shape=by_hand.counts(*shape), strides=by_hand.counts(*strides))


def _random(draw: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    for start in range(0, size, _AT_ONCE):
        numbers = draw.standard_normal(min(_AT_ONCE, size - start), np.float32)
        yield (numbers * np.float32(0.02)).astype(BFLOAT16)


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """One round: the copy, then every conversion."""
    products = folder / "products"
    shutil.rmtree(products, ignore_errors=True)
    products.mkdir()
    file = folder / "bin" / "pytorch_model.bin"
    copy = products / "copy"
    found = _measure("cp", ["cp", str(file), str(copy)], file, copy)
    copy.unlink()
    yield found
    seconds_of_copy = found["seconds"]
    for name, (source, target, flags) in CONVERSIONS.items():
        start, end = (folder if source in ("bin", "safetensors") else products) / source, products / target
        command = [sys.executable, "-m", "cpmjax.convert", str(start), str(end), *flags]
        found = _measure(name, command, start, end)
        yield found | {"ratio": found["seconds"] / seconds_of_copy}
        if target not in _AGAIN:
            shutil.rmtree(end) if end.is_dir() else end.unlink()
    shutil.rmtree(products)


def _measure(name: str, command: list[str], source: Path, target: Path) -> dict[str, Any]:
    """Runs a command that makes `target` of `source` -> its seconds, peak of anonymous bytes, bytes of the target."""
    for file in _files(source):
        _open_and(file, lambda number: os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED))
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(_EVERY)
    if process.returncode:
        sys.exit(f"{name}: {' '.join(command)} failed")
    for file in _files(target):
        _open_and(file, os.fsync)
    seconds = time.perf_counter() - began
    return {
        "name": name,
        "seconds": seconds,
        "anonymous_bytes": peak,
        "written_bytes": sum(file.stat().st_size for file in _files(target)),
    }


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _open_and(file: Path, function: Any) -> None:
    number = os.open(file, os.O_RDONLY)
    try:
        function(number)
    finally:
        os.close(number)


def _anonymous(process: int) -> int:
    """Bytes of anonymous memory of a process and its children."""
    folder = Path("/proc") / str(process)
    try:
        children = [
            int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
        ]
        lines = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    except OSError:  # ended meanwhile
        return 0
    own = 1024 * int(lines.get("RssAnon", "0 kB").split()[0])
    return own + sum(map(_anonymous, children))


def main(folder: Path, rounds: int, preset: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "safetensors").is_dir():
        make(folder, ModelConfig(**PRESETS[preset]))
    for _ in range(rounds):
        for found in measure(folder):
            say(samples(found))


def samples(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name = found["name"]
    yield sample(name, "s", found["seconds"])
    if "ratio" in found:
        yield sample(f"{name}, times as long as cp", "", found["ratio"], bar=3.0)
    yield sample(f"{name}, anonymous memory at most", "GB", found["anonymous_bytes"] / 1e9, bar=3.0)
    yield sample(f"{name}, written", "GB", found["written_bytes"] / 1e9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", choices=PRESETS, default="minicpm-2b", help="which model (default: %(default)s)")
    options = parser.parse_args()
    main(options.folder, options.rounds, options.preset)
