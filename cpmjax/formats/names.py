"""The one table of names: what each of our parameters is called, and how it lies, in the files of others.

Hugging Face stores a matrix [output, input], we store [input, output]. GGUF does as Hugging Face and gives query and
key another order of rows within a head, since llama.cpp rotates neighbours where MiniCPM rotates halves. Sources:
OpenBMB modeling_minicpm.py; llama.cpp's converter for the architecture `minicpm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cpmjax.model.parameters import flat, specs
from cpmjax.model.weights import slice_shape
from cpmjax.run.config import ModelConfig

Format = Literal["huggingface", "gguf"]
_BLOCK = 64  # rows transposed at a time: what the processor's caches hold


@dataclass(frozen=True)
class Entry:
    path: str  # ours
    huggingface: str  # {} is the number of the layer
    gguf: str
    layout: Literal["same", "transposed", "rotary"]  # rotary: transposed, and in GGUF halves of a head interleaved

    def name(self, format: Format, layer: int | None) -> str:
        name: str = getattr(self, format)
        return name if layer is None else name.format(layer)


TABLE = (
    Entry("embedding", "model.embed_tokens.weight", "token_embd.weight", "same"),
    Entry("layers/attention_norm", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight", "same"),
    Entry("layers/query", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight", "rotary"),
    Entry("layers/key", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight", "rotary"),
    Entry("layers/value", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight", "transposed"),
    Entry("layers/output", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight", "transposed"),
    Entry("layers/feed_forward_norm", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight", "same"),  # noqa: E501
    Entry("layers/gate", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight", "transposed"),
    Entry("layers/up", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight", "transposed"),
    Entry("layers/down", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight", "transposed"),
    Entry("final_norm", "model.norm.weight", "output_norm.weight", "same"),
    Entry("head", "lm_head.weight", "output.weight", "transposed"),
)  # fmt: skip
_BY_PATH = {entry.path: entry for entry in TABLE}


@dataclass(frozen=True)
class Place:
    """Where a slice of ours lies in a file of this format: its name and shape there, and both ways between."""

    path: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    _entry: Entry
    _heads: int  # of a rotary matrix in a format that reorders it; 0 where rows stay as they are

    def ours(self, array: np.ndarray) -> np.ndarray:
        """The slice, from the tensor of the file."""
        if self._entry.layout == "same":
            return array
        if self._heads:
            outputs, inputs = array.shape
            array = array.reshape(self._heads, -1, 2, inputs).swapaxes(1, 2).reshape(outputs, inputs)
        return _transposed(array)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The tensor of the file, from the slice."""
        if self._entry.layout == "same":
            return array
        array = _transposed(array)
        if self._heads:
            outputs, inputs = array.shape
            array = array.reshape(self._heads, 2, -1, inputs).swapaxes(1, 2).reshape(outputs, inputs)
        return array


def places(config: ModelConfig, format: Format) -> Iterator[Place]:
    """Every tensor of a model of this shape, in the order in which files hold them."""
    declared = flat(specs(config))

    def place(path: str, layer: int | None) -> Place:
        entry = _BY_PATH[path]
        shape = slice_shape(declared[path])
        heads = config.heads if path == "layers/query" else config.kv
        return Place(
            path,
            layer,
            entry.name(format, layer),
            shape if entry.layout == "same" else shape[::-1],
            entry,
            heads if entry.layout == "rotary" and format == "gguf" else 0,
        )

    yield place("embedding", None)
    for layer in range(config.layers):
        yield from (place(entry.path, layer) for entry in TABLE if entry.path.startswith("layers/"))
    yield from (place(path, None) for path in ("final_norm", "head") if path in declared)


def _transposed(array: np.ndarray) -> np.ndarray:
    """The transpose as an array of its own; in blocks, and as plain integers, several times as fast as numpy's."""
    bits = array.view(f"u{array.itemsize}")
    result = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), _BLOCK):
        result[:, start : start + _BLOCK] = bits[start : start + _BLOCK].T
    return result.view(array.dtype)
