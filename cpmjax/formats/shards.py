"""Weights in several files, as Hugging Face lays them out: shards, and an index that says which tensor is in which."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpmjax.formats.safetensors_files import open_safetensors, tensor_bytes, write_safetensors
from cpmjax.formats.tensors import Shards, TensorInfo, Tensors
from cpmjax.formats.torch_files import open_torch
from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError

INDEX = "model.safetensors.index.json"
_OPENERS: dict[str, Callable[[Path], Tensors]] = {".safetensors": open_safetensors, ".bin": open_torch}


def open_sharded(index: str | Path) -> Tensors:
    """The tensors that a model.safetensors.index.json or pytorch_model.bin.index.json lists.

    Raises UserError unless the shards lie beside the index, all of them, and hold the tensors it lists and no others.
    """
    index = Path(index)
    shards: dict[str, set[str]] = {}
    for tensor, file in _weight_map(index).items():
        # Nothing but a name: a path could lead out of the folder.
        if type(file) is not str or file != os.path.basename(file) or Path(file).suffix not in _OPENERS:
            raise UserError(
                f"{index}: {ascii(tensor)[:80]} is in {ascii(file)[:80]}; "
                f"expected the name of a file in the same folder that ends in {' or '.join(_OPENERS)}"
            )
        shards.setdefault(file, set()).add(tensor)
    missing = [ascii(file)[1:-1] for file in shards if not index.with_name(file).is_file()]
    if missing:
        raise UserError(f"{index}: lists files that are not there: {', '.join(missing)}; expected them beside it")
    return Shards(index, [_open_shard(index, file, tensors) for file, tensors in shards.items()])


def _weight_map(index: Path) -> dict[str, Any]:
    expected = "expected a JSON object with weight_map, the file of each tensor by name"
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "cannot be read as JSON"
        raise UserError(f"{index}: {reason}; {expected}") from error
    weight_map = content.get("weight_map") if type(content) is dict else None
    if type(weight_map) is not dict or not weight_map:
        raise UserError(f"{index}: no weight_map in it; {expected}")
    return weight_map


def _open_shard(index: Path, file: str, listed: set[str]) -> Tensors:
    shard = _OPENERS[Path(file).suffix](index.with_name(file))
    for tensor in sorted(listed - shard.keys()):
        raise UserError(f"{shard.path}: {ascii(tensor)[:80]} is not in it; expected it there, as {index.name} says")
    for tensor in sorted(shard.keys() - listed):
        raise UserError(f"{shard.path}: {tensor[:80]} is not in {index.name}; expected only what is listed")
    return shard


def write_sharded(
    folder: str | Path,
    infos: Mapping[str, TensorInfo],
    arrays: Iterable[np.ndarray],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_bytes` of tensors each, and their index.

    The arrays come in the order of `infos`, one at a time. A tensor that is larger has a shard to itself. Raises
    ValueError as `write_safetensors`.
    """
    folder = Path(folder)
    shards = _split(infos, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", infos, arrays)
        return
    weight_map: dict[str, str] = {}
    arrays = iter(arrays)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # The last one takes what is left: whether there are too many shows there.
        write_safetensors(folder / file, shard, itertools.islice(arrays, len(shard) if number < len(shards) else None))
        weight_map |= dict.fromkeys(shard, file)
    content = {"metadata": {"total_size": sum(map(tensor_bytes, infos.values()))}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _split(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_bytes
    for name, info in infos.items():
        size = tensor_bytes(info)
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = info
        room -= size
    return shards
