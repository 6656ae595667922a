"""Parameter counts of the presets equal the published ones exactly (paper, Table 2 and Table 8)."""

from __future__ import annotations

import pytest

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.parameters import count
from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ModelConfig


def preset(name):
    return ModelConfig(**PRESETS[name])


@pytest.mark.parametrize("name, without_embeddings, total", [
    ("minicpm-2b", 2_442_057_984, 2_724_880_896),
    ("minicpm-1b", 1_247_442_432, 1_247_442_432 + 112_803_840),
    ("minicpm-2b-128k", 2_442_057_984, 2_442_057_984 + 2 * 122_760 * 2304),
])  # fmt: skip
def test_released_counts(name, without_embeddings, total):
    assert count(preset(name), embeddings=False) == without_embeddings
    assert count(preset(name)) == total


@pytest.mark.parametrize("name, billions", [
    ("tunnel-9m", 0.009), ("tunnel-30m", 0.036), ("tunnel-70m", 0.066), ("tunnel-0.1b", 0.109),
    ("tunnel-0.17b", 0.166), ("tunnel-0.2b", 0.241), ("tunnel-0.5b", 0.499),
])  # fmt: skip
def test_wind_tunnel_counts(name, billions):
    config = preset(name)
    matrices = round(11.5 * config.width**2 * config.layers)
    norms = (2 * config.layers + 1) * config.width
    assert count(config, embeddings=False) == matrices + norms
    assert round(matrices / 1e9, 3) == billions
    assert config.head == 64


def test_training_flops_of_minicpm_2b():
    """18.6 GFLOP a token at 4096: 6 N with the head once, and the causal half of attention."""
    assert training_flops_per_token(preset("minicpm-2b"), 4096) == pytest.approx(18.6e9, rel=0.005)
