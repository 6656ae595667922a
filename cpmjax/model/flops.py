"""The formula behind every MFU.

Training a token costs 6 FLOPs for each weight it is multiplied with (2 forward, 4 backward; Kaplan et al. 2020): all
matrices, and the head once; an embedding lookup is free. Attention adds 12 * layers * heads * head width * length for
scores and mixing, of which the causal half is counted. Recomputation is not counted: MFU, not hardware utilisation.
"""

from __future__ import annotations

from cpmjax.model.parameters import count
from cpmjax.run.config import ModelConfig


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of forward and backward for one token of rows of `length` tokens."""
    weights = count(config, embeddings=False) + config.vocabulary * config.width
    attention = 12 * config.layers * config.heads * config.head * length / 2
    return 6.0 * weights + attention
