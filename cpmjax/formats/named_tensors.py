"""Weights in files of named tensors, both ways; what a file has too much or too little of is an error that lists it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from cpmjax.formats.names import Format, Place, places
from cpmjax.formats.tensors import Tensors
from cpmjax.model.weights import DTYPES, FLOAT32, Weights
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

_LISTED = 6  # names of a long list that an error shows
_MANY = 1000  # layers, beyond which names are not listed before there are as many tensors
# Buffers that older transformers saved with the weights: what rope_theta says already.
_INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def weights_of(tensors: Tensors, config: ModelConfig, format: Format) -> Weights:
    """The weights of a model of this shape.

    A head that a tied model brings along must equal the embedding, and inverse frequencies must be those of
    rope_theta: they are checked and left out. Raises UserError listing tensors that are missing, unknown, of another
    shape or of no floating type.
    """
    if config.layers > max(_MANY, len(tensors)):  # a config may say any number
        raise UserError(f"{tensors.path}: {len(tensors)} tensors; expected those of {_named(config)}")
    wanted = {place.name: place for place in places(config, format)}
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted and not _known_extra(name, tensors, config, format)]
    if missing or unknown:
        said = [f"{kind} {_listed(names)}" for kind, names in (("lacks", missing), ("has", unknown)) if names]
        raise UserError(f"{tensors.path}: {' and '.join(said)}; expected the {len(wanted)} tensors of {_named(config)}")
    for name, place in wanted.items():
        info = tensors[name]
        if info.shape != place.shape:
            raise UserError(f"{tensors.path}: {name} is {_by(info.shape)}; expected {_by(place.shape)}")
        if info.dtype not in DTYPES.values():
            raise UserError(f"{tensors.path}: {name} holds {info.stored}; expected float32, float16 or bfloat16")

    types: dict[str, set[np.dtype]] = {}
    where: dict[tuple[str, int | None], Place] = {}
    for name, place in wanted.items():
        types.setdefault(place.path, set()).add(tensors[name].dtype)
        where[place.path, place.layer] = place
    # Layers of different types are stored together in the type that holds them all.
    dtypes = {path: found.pop() if len(found) == 1 else FLOAT32 for path, found in types.items()}

    def read(path: str, layer: int | None) -> np.ndarray:
        place = where[path, layer]
        return place.ours(tensors.read(place.name)).astype(dtypes[path], copy=False)

    return Weights(config, dtypes, read)


def named_tensors(weights: Weights, format: Format) -> Iterator[tuple[Place, np.ndarray]]:
    """Each tensor of a file in its order, one in memory at a time."""
    for place in places(weights.config, format):
        yield place, place.theirs(weights.read(place.path, place.layer))


def _known_extra(name: str, tensors: Tensors, config: ModelConfig, format: Format) -> bool:
    """Whether a tensor without a parameter is one that says nothing new; raises UserError if it contradicts one."""
    if config.tied and name == {"huggingface": "lm_head.weight", "gguf": "output.weight"}[format]:
        embedding = next(places(config, format)).name
        if embedding in tensors and not np.array_equal(tensors.read(name), tensors.read(embedding)):
            raise UserError(
                f"{tensors.path}: {name} differs from {embedding}, but the head of the model is its embedding; "
                "expected equal tensors, or tie_word_embeddings false in the config"
            )
        return True
    if _INVERSE_FREQUENCIES.fullmatch(name):
        expected = config.rope_theta ** (-np.arange(0, config.head, 2) / config.head)
        found = tensors.read(name).astype(np.float64)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=2**-7, atol=0):
            raise UserError(
                f"{tensors.path}: {name} is not that of rope_theta = {config.rope_theta:g}; "
                f"expected {len(expected)} powers of it"
            )
        return True
    return False


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _named(config: ModelConfig) -> str:
    tied = "tied" if config.tied else "untied"
    return f"a MiniCPM of {config.layers} layers, width {config.width}, vocabulary {config.vocabulary}, head {tied}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "a number"
