"""The golden fixtures as models: tiny checkpoints with the numbers of the original PyTorch code (tests/golden).

What reads them here is not what the package reads them with, so that a wrong name or transpose there shows.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, ModelConfig

GOLDEN = Path(__file__).parent / "golden"
MORE = Path(__file__).parents[2] / "shared/golden"  # fixtures that are no part of the project

# our leaf of a layer -> the original's, whose matrices are stored [output, input]
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def folder(name: str) -> Path:
    """Where a fixture lies. Skips the test where it is missing."""
    for home in (GOLDEN, MORE):
        if (home / name).exists():
            return home / name
    pytest.skip(f"needs {MORE / name}")


def config(name: str, **changes: Any) -> ModelConfig:
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    read = ModelConfig(
        vocabulary=raw["vocab_size"],
        width=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        feed_forward=raw["intermediate_size"],
        context=raw["max_position_embeddings"],
        norm_epsilon=raw["rms_norm_eps"],
        scale_emb=raw["scale_emb"],
        scale_depth=raw["scale_depth"],
        dim_model_base=raw["dim_model_base"],
    )
    return replace(read, **changes)


def to_tree(tensors: dict[str, Any], layers: int) -> dict[str, Any]:
    """Tensors by their original names -> our nested dict, float32."""

    def stacked(name: str) -> Any:
        each = [np.asarray(tensors[f"model.layers.{i}.{name}.weight"], np.float32) for i in range(layers)]
        return jnp.asarray(np.stack([x.T if x.ndim == 2 else x for x in each]))

    return {
        "embedding": jnp.asarray(np.asarray(tensors["model.embed_tokens.weight"], np.float32)),
        "layers": {ours: stacked(theirs) for ours, theirs in LAYER_NAMES.items()},
        "final_norm": jnp.asarray(np.asarray(tensors["model.norm.weight"], np.float32)),
    }


def load(name: str, compute: ComputeConfig = ComputeConfig(), **changes: Any) -> MiniCPM:
    model_config = config(name, **changes)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    return MiniCPM(model_config, to_tree(tensors, model_config.layers), compute)


def expected(name: str, file: str = "expected.npz") -> dict[str, np.ndarray]:
    with np.load(folder(name) / file) as arrays:
        return {key: arrays[key] for key in arrays}


def difference(model: MiniCPM, numbers: dict[str, np.ndarray], logits: str = "logits") -> np.ndarray:
    """|logits - expected|, [places, vocabulary]: of every place of `input_ids` that is no padding."""
    tokens = np.atleast_2d(numbers["input_ids"]).astype(np.int32)
    real = numbers.get("attention_mask", np.ones_like(tokens))
    found = np.asarray(model(tokens, segments_BL=jnp.asarray(real, jnp.int32)))
    return np.abs(found - numbers[logits].reshape(found.shape))[real == 1]
