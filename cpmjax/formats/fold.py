"""MiniCPM as Llama, and back: the three muP constants go into the weights, or come out of them.

    embedding * scale_emb;  output, down * scale_depth / sqrt(layers);  head (or embedding) * dim_model_base / width

(minicpm.md of the release, checked against transformers' LlamaForCausalLM.) The products are taken in float32 and
rounded to the type of the weights: exact but for one rounding in float32, lossy in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from cpmjax.model import mup
from cpmjax.model.parameters import flat, specs
from cpmjax.model.weights import FLOAT32, Weights, cast
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

_ROWS = 4096  # of a matrix that are float32 at one time


@dataclass(frozen=True)
class Constants:
    """The three numbers that make a MiniCPM of a Llama, as its config.json spells them."""

    scale_emb: float
    scale_depth: float
    dim_model_base: int

    def of(self, config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            parametrisation="minicpm",
            scale_emb=self.scale_emb,
            scale_depth=self.scale_depth,
            dim_model_base=self.dim_model_base,
        )


def constants(config: ModelConfig) -> Constants:
    """Those with which MiniCPM's own code computes what this model computes, whatever its parametrisation.

    Raises UserError where there are none: its dim_model_base is a whole number.
    """
    forward = mup.multipliers(config)
    if config.parametrisation in ("minicpm", "minicpm_table7"):
        return Constants(config.scale_emb, config.scale_depth, config.dim_model_base)
    base = config.width * float(forward.logits)
    if round(base) < 1 or not math.isclose(base, round(base)):
        raise UserError(
            f"model.parametrisation = {config.parametrisation!r}: hidden states are multiplied by {forward.logits:g} "
            f"before the head; expected a whole number over model.width = {config.width}"
        )
    return Constants(float(forward.embedding), float(forward.residual) * math.sqrt(config.layers), round(base))


def as_llama(config: ModelConfig, tied: bool) -> ModelConfig:
    """The shape of a model whose three multipliers are 1."""
    return replace(
        config,
        parametrisation="standard",
        scale_emb=1.0,
        scale_depth=math.sqrt(config.layers),
        dim_model_base=config.width,
        tied=tied,
    )


def fold(weights: Weights, dtype: np.dtype | None = None) -> Weights:
    """The Llama that computes what this MiniCPM computes, in the type of the weights or in another; its head is a
    matrix of its own."""
    config = weights.config
    if all(multiplier == 1 for multiplier in mup.multipliers(config)):
        return cast(replace(weights, config=as_llama(config, config.tied)), dtype)
    exact = weights if dtype is None else cast(weights, FLOAT32)  # so that a product is rounded once
    dtypes = exact.dtypes | {"head": exact.dtypes["embedding" if config.tied else "head"]}
    return cast(Weights(as_llama(config, tied=False), dtypes, _rescaled(exact, _scales(config), np.multiply)), dtype)


def unfold(weights: Weights, known: Constants, dtype: np.dtype | None = None) -> Weights:
    """The MiniCPM with these constants that computes what this Llama computes, in the type it has or in another.

    Its head is its embedding if the two agree to the roundings of the fold, which leaves the model as it was released.
    """
    config = known.of(weights.config)
    scales = _scales(config)
    # What the fold rounded to is the type that the weights have, whatever type they are to get.
    as_they_are = _rescaled(weights, scales, np.divide)
    config = replace(config, tied=_equal(as_they_are("embedding", None), as_they_are("head", None).T))
    exact = weights if dtype is None else cast(weights, FLOAT32)
    dtypes = {path: exact.dtypes.get(path, exact.dtypes["embedding"]) for path in flat(specs(config))}
    return cast(Weights(config, dtypes, _rescaled(exact, scales, np.divide)), dtype)


def _rescaled(
    weights: Weights, scales: dict[str, float], times_or_by: Callable[..., np.ndarray]
) -> Callable[[str, int | None], np.ndarray]:
    """Reads slices multiplied or divided by their scales, and the head of a tied model from its embedding."""

    def read(path: str, layer: int | None) -> np.ndarray:
        tied_head = path == "head" and weights.config.tied
        array = weights.read("embedding", None).T if tied_head else weights.read(path, layer)
        return _scaled(array, times_or_by, scales[path]) if path in scales else array

    return read


def _scales(config: ModelConfig) -> dict[str, float]:
    """What the matrices are multiplied by."""
    embedding, residual, logits = map(float, mup.multipliers(config))
    return {"embedding": embedding, "layers/output": residual, "layers/down": residual, "head": logits}


def _scaled(array: np.ndarray, times_or_by: Callable[..., np.ndarray], scale: float) -> np.ndarray:
    if array.ndim == 2 and not array.flags.c_contiguous:
        return _scaled(array.T, times_or_by, scale).T
    result = np.empty_like(array)
    for start in range(0, len(array), _ROWS):
        block = array[start : start + _ROWS].astype(np.float32)
        result[start : start + _ROWS] = times_or_by(block, np.float32(scale)).astype(array.dtype)
    return result


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two matrices differ by no more than what scaling each of them and back can leave."""
    limits = ml_dtypes.finfo(one.dtype)
    relative, absolute = 2 * float(limits.eps), 64 * float(limits.smallest_subnormal)
    for start in range(0, len(one), _ROWS):
        a, b = (each[start : start + _ROWS].astype(np.float32) for each in (one, other))
        if not np.all(np.abs(a - b) <= relative * np.abs(a) + absolute):
            return False
    return True
