"""A stored model becomes a Hugging Face folder, a Llama, or a GGUF file: complete, or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_VERSION

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.formats.config_files import write_config
from cpmjax.formats.fold import fold
from cpmjax.formats.gguf_files import storable, write_gguf
from cpmjax.formats.gguf_model import model_metadata
from cpmjax.formats.gguf_vocabulary import vocabulary_metadata
from cpmjax.formats.json_files import write_json
from cpmjax.formats.loading import Stored
from cpmjax.formats.named_tensors import named_tensors
from cpmjax.formats.names import places
from cpmjax.formats.shards import write_sharded
from cpmjax.formats.tensors import TensorInfo
from cpmjax.formats.tokenizer_files import write_tokenizer
from cpmjax.model.weights import BFLOAT16, DTYPES, FLOAT16, FLOAT32, Weights
from cpmjax.run.directory import only_writer
from cpmjax.run.errors import UserError

Quantisation = Literal["q8_0", "q4_0"]
_SHARD = 5 * 10**9  # bytes of tensors in one file, as transformers cuts them
# How a whole file is called after the type of its matrices.
_FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def export_huggingface(stored: Stored, target: Path, shard_bytes: int = _SHARD) -> None:
    """A folder as MiniCPM was released: config.json, safetensors, tokenizer files.

    Raises UserError if the target is there already, or for a model that MiniCPM's own code cannot compute.
    """
    _export_folder(stored.weights, stored.tokenizer, target, shard_bytes, llama=False)


def export_llama(stored: Stored, target: Path, dtype: np.dtype | None = None, shard_bytes: int = _SHARD) -> None:
    """A folder that every Llama loader reads: the muP constants are in the weights, in their type or in `dtype`."""
    _export_folder(fold(stored.weights, dtype), stored.tokenizer, target, shard_bytes, llama=True)


def export_gguf(stored: Stored, target: Path, quantisation: Quantisation | None = None) -> list[str]:
    """A GGUF file of llama.cpp's architecture `minicpm`; returns what there is to say about it.

    Norms are float32, as llama.cpp wants them; matrices whose rows are no whole number of blocks stay float16.
    """
    weights, tokenizer, said = stored.weights, stored.tokenizer, []
    config = weights.config
    kind = quantisation or {dtype: name for name, dtype in DTYPES.items()}[_widest(weights)]
    tensor_type, file_type = _FILE_TYPES[kind]
    metadata = model_metadata(config, target.stem)
    metadata |= {"general.file_type": int(file_type), "general.quantization_version": GGML_QUANT_VERSION}
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
        said.append("there is no tokenizer: the file has no vocabulary, and llama.cpp's server does not start with it")
    else:
        starts_with_space = tokenizer.text_start == "prefix_space"
        metadata |= vocabulary_metadata(
            tokenizer.model, config.vocabulary, tokenizer.added_tokens, starts_with_space, tokenizer.chat_template
        )
    if config.rope_scaling == "dynamic":
        said.append(f"llama.cpp has no dynamic NTK: it is exact up to {config.context} tokens, and not beyond")
    infos = {place.name: (place.shape, storable(place.shape, tensor_type)) for place in places(config, "gguf")}
    plain = [name for name, (shape, type_) in infos.items() if len(shape) > 1 and type_ != tensor_type]
    if plain:
        said.append(f"{len(plain)} matrices stay f16, since their rows are no multiple of 32: {plain[0]} and its like")
    with _beside(target) as partial:
        write_gguf(partial, metadata, infos, (array for _, array in named_tensors(weights, "gguf")))
    return said


def _export_folder(weights: Weights, tokenizer: Tokenizer | None, target: Path, shard_bytes: int, llama: bool) -> None:
    bos, eos = (1, 2) if tokenizer is None else (tokenizer.bos, tokenizer.eos)
    infos = {
        place.name: TensorInfo(place.shape, weights.dtypes[place.path], "")
        for place in places(weights.config, "huggingface")
    }
    with _beside(target) as partial:
        partial.mkdir()
        write_config(partial / "config.json", weights.config, _widest(weights), llama, bos, eos)
        write_json(partial / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
        if tokenizer is not None:
            write_tokenizer(partial, tokenizer)
        write_sharded(partial, infos, (array for _, array in named_tensors(weights, "huggingface")), shard_bytes)


def _widest(weights: Weights) -> np.dtype:
    """The type that holds all of the weights."""
    types = set(weights.dtypes.values())
    return next(dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32) if types == {dtype} or dtype == FLOAT32)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A place beside the target, renamed to it when the block ends; what a kill left there is cleared first.

    Raises UserError if there is something at the target, or another process writes it.
    """
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already; expected a new place")
    workplace = target.with_name(f".{target.name}.partial")
    with only_writer(workplace, "target"):
        partial = workplace / target.name
        _remove(partial)
        try:
            yield partial
            os.replace(partial, target)
        except OSError as error:
            error.filename = error.filename or str(target)  # a full disk shows at a write, which does not know the name
            raise
        finally:
            shutil.rmtree(workplace)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
