"""Checkpoints of models that memory does not hold: parameters go to orbax, and come from it, one slice at a time.

Orbax hands each leaf of a tree to the handler of its type. A `_Streamed` leaf is `Weights` of one path: its handler
lets orbax choose where and how the array is stored, and writes it slice by slice through tensorstore. What is written
is an ordinary item of a checkpoint, restored like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from cpmjax.checkpoint import object_stores
from cpmjax.model.parameters import ParamSpec, Tree
from cpmjax.model.weights import Weights, slice_shape
from cpmjax.run.config import ModelConfig

_CHUNK = 64 * 2**20  # bytes, at most: what is compressed, written and read at one time


@dataclass
class _Save:
    """What the leaves of one tree know of each other."""

    unfinished: int
    failure: Exception | None = None


@dataclass(frozen=True)
class _Streamed:
    weights: Weights
    path: str
    spec: ParamSpec
    save: _Save

    # What orbax asks of an array.

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype:
        return self.weights.dtypes[self.path]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Stores a `_Streamed` as a numpy array is stored, but never has more of it in memory than a slice."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        """All leaves are written side by side. A failure of one is raised when nothing is being written any more: the
        folder may be deleted then, and stays so."""
        save = value.save
        try:
            await self._write(value, tspec, ts_context)
        except Exception as error:
            save.failure = save.failure or error
        save.unfinished -= 1
        if save.failure is not None and save.unfinished == 0:
            raise save.failure

    async def _write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        tspec["metadata"]["chunks"] = chunk_shape(value.spec, value.dtype)
        stored = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        if value.spec.axes[0] != "layers":
            await stored.write(value.weights.read(value.path, None), can_reference_source_data_indefinitely=True)
            return
        for layer in range(value.shape[0]):
            if value.save.failure is not None:
                return
            array = value.weights.read(value.path, layer)
            await stored[layer].write(array, can_reference_source_data_indefinitely=True)


def chunk_shape(spec: ParamSpec, dtype: np.dtype) -> list[int]:
    """How an array is cut on disk: one layer alone, and nothing larger than 64 MiB unless a row is."""
    shape = slice_shape(spec)
    row = math.prod(shape[1:]) * dtype.itemsize
    within = [max(1, min(shape[0], _CHUNK // row)), *shape[1:]]
    return [1, *within] if spec.axes[0] == "layers" else within


def item_handler() -> ocp.PyTreeCheckpointHandler:
    """Of an item that holds the tree of `streamed`; uncompressed, since weights hardly shrink and zstd takes longer
    than the disk."""
    # Metadata of a step is read through the same handler, whoever wrote it: that of jax.Array belongs to it.
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Streamed, _StreamedHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)


def streamed(weights: Weights) -> Tree:
    """The nested dict of parameters whose leaves are read when orbax writes them."""
    tree: Tree = {"layers": {}}
    save = _Save(unfinished=len(weights.specs))
    for path, spec in weights.specs.items():
        folder, _, name = path.rpartition("/")
        (tree[folder] if folder else tree)[name] = _Streamed(weights, path, spec, save)
    return tree


def stored_weights(item: epath.Path, config: ModelConfig, dtypes: dict[str, np.dtype]) -> Weights:
    """The parameters in an item of a checkpoint, read slice by slice; nothing is read before it is asked for."""
    context = ts.Context()
    opened: dict[str, ts.TensorStore] = {}

    def read(path: str, layer: int | None) -> np.ndarray:
        if path not in opened:
            kvstore = {"driver": "ocdbt", "base": object_stores.kvstore(item), "path": path.replace("/", ".") + "/"}
            opened[path] = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True, context=context).result()
        stored = opened[path]
        return (stored if layer is None else stored[layer]).read().result()

    return Weights(config, dtypes, read)
