"""The parameters of a model at rest, wherever they lie, read one slice at a time.

A slice is one layer of a stacked parameter, or the whole of one that is not stacked. Readers, writers and conversions
meet here: what reads a file gives `Weights`, what changes weights is a function from `Weights` to `Weights`, and no
more than a slice or two of a model need be in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.model.parameters import ParamSpec, Tree, flat, specs
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

BFLOAT16 = np.dtype(jnp.bfloat16)
FLOAT16 = np.dtype(np.float16)
FLOAT32 = np.dtype(np.float32)
DTYPES = {"bf16": BFLOAT16, "f16": FLOAT16, "f32": FLOAT32}


@dataclass(frozen=True)
class Weights:
    """`read(path, layer)` gives a slice as a host array: layer `layer` of a stacked parameter, without the axis of
    layers, or the whole of another one with layer None. Paths are those of `cpmjax.model.parameters.flat`."""

    config: ModelConfig
    dtypes: dict[str, np.dtype]  # of each path: float32, float16 or bfloat16
    read: Callable[[str, int | None], np.ndarray]

    @property
    def specs(self) -> dict[str, ParamSpec]:
        return flat(specs(self.config))

    def slices(self) -> Iterator[tuple[str, int | None]]:
        """Every slice once, layer by layer: the order in which a model is computed, and in which files hold it."""
        stacked = [path for path in self.specs if path.startswith("layers/")]
        yield "embedding", None
        for layer in range(self.config.layers):
            yield from ((path, layer) for path in stacked)
        yield from ((path, None) for path in self.specs if path not in ("embedding", *stacked))

    def dtype_names(self) -> str:
        """The types in words, as DTYPES spells them: "bf16", or "bf16 and f32"."""
        return " and ".join(name for name, dtype in DTYPES.items() if dtype in self.dtypes.values())

    def tree(self) -> Tree:
        """All of it as the nested dict that a model takes, on the default device."""
        tree: Tree = {"layers": {}}
        for path, spec in self.specs.items():
            folder, _, name = path.rpartition("/")
            if folder:
                stacked = np.empty(spec.shape, self.dtypes[path])
                for layer in range(self.config.layers):
                    stacked[layer] = self.read(path, layer)
                tree[folder][name] = jax.device_put(stacked)
            else:
                tree[name] = jax.device_put(self.read(path, None))
        return tree


def slice_shape(spec: ParamSpec) -> tuple[int, ...]:
    return spec.shape[1:] if spec.axes[0] == "layers" else spec.shape


def checksum(array: np.ndarray, before: int = 0) -> int:
    """CRC-32 of the bytes of a slice, going on from that of what came before it."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, before)


def cast(weights: Weights, dtype: np.dtype | None) -> Weights:
    """The same weights in another type, rounded to nearest even; None changes nothing.

    Reading raises UserError for a slice with a value that the type cannot hold.
    """
    if dtype is None or set(weights.dtypes.values()) == {dtype}:
        return weights

    def read(path: str, layer: int | None) -> np.ndarray:
        array = weights.read(path, layer)
        if array.dtype == dtype:
            return array
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if dtype == FLOAT16 and not np.array_equal(np.isfinite(result), np.isfinite(array)):
            largest = float(np.max(np.abs(array.astype(np.float32))))
            where = path if layer is None else f"{path}, layer {layer}"
            raise UserError(f"{where}: holds {largest:g}, too large for f16; expected --dtype bf16 or f32")
        return result

    return replace(weights, dtypes=dict.fromkeys(weights.dtypes, dtype), read=read)
