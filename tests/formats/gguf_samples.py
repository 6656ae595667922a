"""Small GGUF files of the architecture minicpm, sound or spoilt in one way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from cpmjax.formats.gguf_files import write_gguf
from cpmjax.formats.gguf_model import model_metadata
from cpmjax.formats.names import places
from cpmjax.run.config import ModelConfig


def write_minicpm(
    path: Path,
    width: int,
    lost: tuple[str, ...] = (),
    change: Mapping[str, Any] = {},
    spoil: Mapping[str, float] = {},
) -> Path:
    """One layer with random weights and the released scales, without the keys `lost`, with others changed; `spoil`
    gives one number of a tensor another value."""
    config = ModelConfig(vocabulary=40, width=width, layers=1, heads=2, feed_forward=32, context=64)
    metadata = model_metadata(config, "sample") | {"tokenizer.ggml.model": "none"} | dict(change)
    for key in lost:
        del metadata[f"minicpm.{key}"]
    random = np.random.default_rng(0)
    arrays = {place.name: random.standard_normal(place.shape).astype(np.float32) for place in places(config, "gguf")}
    for name, value in spoil.items():
        arrays[name].flat[3] = value
    infos = {name: (array.shape, GGMLQuantizationType.F32) for name, array in arrays.items()}
    write_gguf(path, metadata, infos, arrays.values())
    return path
