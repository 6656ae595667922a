"""What the metadata of a GGUF file says of a model, both ways: its shape, and the three muP scales.

llama.cpp's architecture `minicpm` computes  embedding * embedding_scale,  branch * residual_scale  and
logits / logit_scale.  Files from before November 2024 lack the three keys. For a missing logit_scale llama.cpp takes
256 / width where the model has width / 256, so that its logits are (width / 256)^2 times too sharp: 81 times for
MiniCPM-2B. Written here are always all three; read, what is missing is that of the release, and said.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cpmjax.data.tokenizer import TextStart, Tokenizer
from cpmjax.formats.fold import as_llama, constants
from cpmjax.formats.gguf_files import GgufFile
from cpmjax.formats.gguf_vocabulary import sentencepiece_from_metadata
from cpmjax.model import mup
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError

_BASE = 256  # dim_model_base of the release
_OLD = (12.0, 1.4)  # its scale_emb and scale_depth
SCALES = ("embedding_scale", "residual_scale", "logit_scale")
# What errors call our keys: as the file does.
_THEIRS = {
    "width": "embedding_length",
    "layers": "block_count",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_width": "attention.key_length",
    "feed_forward": "feed_forward_length",
    "context": "context_length",
    "norm_epsilon": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_factor": "rope.scaling.factor",
}
# llama.cpp knows no dynamic NTK: up to context_length it is plain rotation, and these keys bring it back to us.
_SCALING, _FACTOR = "cpmjax.rope.scaling.type", "cpmjax.rope.scaling.factor"


def model_metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """The keys of llama.cpp's architecture `minicpm` for this model."""
    forward = mup.multipliers(config)
    constants(config)  # refuses what the architecture cannot compute
    keys: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.feed_forward,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv,
        "attention.layer_norm_rms_epsilon": float(config.norm_epsilon),
        "rope.dimension_count": config.head,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocabulary,
        "embedding_scale": float(forward.embedding),
        "residual_scale": float(forward.residual),
        "logit_scale": 1 / float(forward.logits),
    }
    if config.head * config.heads != config.width:
        keys |= {"attention.key_length": config.head, "attention.value_length": config.head}
    if config.rope_scaling == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_factor)}
    metadata: dict[str, Any] = {"general.architecture": "minicpm", "general.name": name, "general.type": "model"}
    metadata |= {f"minicpm.{key}": value for key, value in keys.items()}
    if config.rope_scaling == "dynamic":
        metadata |= {_SCALING: "dynamic", _FACTOR: float(config.rope_factor)}
    return metadata


def read_config(file: GgufFile) -> tuple[ModelConfig, list[str]]:
    """(the model of a GGUF file of the architecture minicpm or llama, what was filled in, in words).

    Raises UserError naming the key that is missing, impossible or not supported.
    """
    architecture = _text(file, "general.architecture")
    if architecture not in ("minicpm", "llama"):
        raise UserError(f"{file.path}: general.architecture = {architecture[:60]!r}; expected minicpm or llama")

    def number(key: str, default: float | None = None, whole: bool = False) -> Any:
        value: Any = file.metadata.get(key if key == _FACTOR else f"{architecture}.{key}", default)
        if value is None:
            raise UserError(f"{file.path}: lacks {architecture}.{key}; expected the shape of the model")
        kinds, largest = (int, 2**31 - 1) if whole else ((int, float), float(np.finfo(np.float32).max))
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= largest:
            raise UserError(f"{file.path}: {key} = {str(value)[:60]}; expected a {'whole ' if whole else ''}number")
        return value if whole else short(float(value))

    if "token_embd.weight" not in file or len(file["token_embd.weight"].shape) != 2:
        raise UserError(f"{file.path}: lacks token_embd.weight; expected a matrix with a row a token")
    heads, width = number("attention.head_count", whole=True), number("embedding_length", whole=True)
    head_width = number("attention.key_length", width // heads if heads > 0 else 0, whole=True)
    rotated = number("rope.dimension_count", head_width, whole=True)
    if rotated != head_width:
        raise UserError(f"{file.path}: rope.dimension_count = {rotated}; expected the width of a head, {head_width}")
    config = ModelConfig(
        vocabulary=file["token_embd.weight"].shape[0],
        width=width,
        layers=number("block_count", whole=True),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads, whole=True),
        head_width=None if head_width * heads == width else head_width,
        feed_forward=number("feed_forward_length", whole=True),
        context=number("context_length", whole=True),
        tied="output.weight" not in file,
        norm_epsilon=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
    )
    config = _with_scaling(config, file, architecture, number)
    for key, allowed in config.problems():
        raise UserError(f"{file.path}: {_THEIRS.get(key, key)} = {getattr(config, key)}; expected {allowed}")
    if architecture == "llama":
        return as_llama(config, config.tied), []
    return _with_scales(config, file, number)


def read_tokenizer(file: GgufFile, text_start: TextStart | None = None) -> Tokenizer | None:
    """The tokenizer of a GGUF file, starting text as the file says unless told otherwise; None if it has none."""
    if _text(file, "tokenizer.ggml.model", "none") == "none":
        return None
    model, added_tokens, start, template = sentencepiece_from_metadata(file.metadata, file.path)
    return Tokenizer(model, text_start or start, template, source=file.path, added_tokens=added_tokens)


def scale_findings(file: GgufFile) -> list[str]:
    """What is to be said of the three scale keys of a `minicpm` file: nothing if they are there and sane."""
    metadata, width = file.metadata, file.metadata.get("minicpm.embedding_length")
    if _text(file, "general.architecture") != "minicpm" or not isinstance(width, int) or width < 1:
        return []
    said = []
    sharper = (width / _BASE) ** 2
    missing = [key for key in SCALES if f"minicpm.{key}" not in metadata]
    if missing:
        said.append(f"lacks {', '.join(f'minicpm.{key}' for key in missing)}: taken as in the release")
    if "logit_scale" in missing:
        said.append(
            f"without minicpm.logit_scale llama.cpp makes logits {sharper:.4g} times too sharp: greedy text is the "
            "same, sampled text is not; converting this file to gguf again mends it"
        )
    logit_scale = metadata.get("minicpm.logit_scale")
    if isinstance(logit_scale, float) and width > _BASE and np.isclose(logit_scale, _BASE / width, rtol=1e-3):
        said.append(
            f"minicpm.logit_scale = {logit_scale:.4g} is inverted: logits are divided by it, and the release divides "
            f"by {width / _BASE:g}; logits are {sharper:.4g} times too sharp"
        )
    return said


def short(value: float) -> float:
    """The shortest decimal that is the same number in float32: 1e-05 was stored as 9.99999974e-06."""
    return float(str(np.float32(value)))


def _text(file: GgufFile, key: str, default: str = "") -> str:
    value = file.metadata.get(key, default)
    if not isinstance(value, str):
        raise UserError(f"{file.path}: {key} is of type {type(value).__name__}; expected a string")
    return value


def _with_scaling(config: ModelConfig, file: GgufFile, architecture: str, number: Any) -> ModelConfig:
    kind = _text(file, f"{architecture}.rope.scaling.type", "none")
    if kind == "linear":
        return replace(config, rope_scaling="linear", rope_factor=number("rope.scaling.factor"))
    if kind != "none":
        raise UserError(f"{file.path}: rope.scaling.type = {kind[:60]!r} is not supported; expected none or linear")
    if _text(file, _SCALING) == "dynamic":
        return replace(config, rope_scaling="dynamic", rope_factor=number(_FACTOR))
    return config


def _with_scales(config: ModelConfig, file: GgufFile, number: Any) -> tuple[ModelConfig, list[str]]:
    root = float(np.sqrt(config.layers))
    defaults = (_OLD[0], _OLD[1] / root, config.width / _BASE)
    embedding_scale, residual_scale, logit_scale = map(number, SCALES, defaults)
    for key, scale in zip(SCALES, (embedding_scale, residual_scale, logit_scale), strict=True):
        if not scale > 0:
            raise UserError(f"{file.path}: minicpm.{key} = {scale:g}; expected a positive number")
    base = config.width / logit_scale
    if abs(base - round(base)) > 1e-4 * base or base < 0.5:
        raise UserError(
            f"{file.path}: minicpm.logit_scale = {logit_scale:g}; "
            f"expected the width, {config.width}, over a whole number"
        )
    # scale_depth was rounded to float32 after the division: six digits bring back what was meant.
    config = replace(
        config,
        scale_emb=embedding_scale,
        scale_depth=float(f"{residual_scale * root:.6g}"),
        dim_model_base=round(base),
    )
    return config, scale_findings(file)
