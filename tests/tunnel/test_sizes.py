"""The models of a wind tunnel, against the paper's Table 8 and by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.tunnel.sizes import Axis, make_axis

BASE = ModelConfig(vocabulary=512, width=64, layers=2, heads=2, feed_forward=160, dim_model_base=64)
TABLE8 = {"tunnel-9m": (320, 800, 5, 8), "tunnel-30m": (512, 1280, 8, 12), "tunnel-0.5b": (1344, 3360, 21, 24)}


def at(axis: str, value, base: ModelConfig = BASE, parametrisation: str = "minicpm") -> ModelConfig:
    return Axis(axis, (value,)).model(base, value, parametrisation)


def test_a_wider_model_has_more_heads_of_the_same_width():
    wide = at("width", 512)
    assert (wide.width, wide.heads, wide.head, wide.feed_forward) == (512, 16, 32, 1280)
    assert at("width", 64) == BASE
    assert (wide.layers, wide.vocabulary, wide.dim_model_base) == (2, 512, 64)
    narrow = at("width", 32)
    assert (narrow.heads, narrow.head, narrow.feed_forward) == (1, 32, 80)


def test_key_value_heads_grow_along():
    grouped = replace(BASE, heads=4, kv_heads=2)
    wide = at("width", 128, grouped)
    assert (wide.heads, wide.kv, wide.head) == (8, 4, 16)
    with pytest.raises(UserError, match=r"width.*32.*1 key-value"):
        at("width", 32, replace(grouped, kv_heads=1), "minicpm")


def test_a_head_width_of_its_own_stays():
    wide = at("width", 128, replace(BASE, head_width=48))
    assert (wide.heads, wide.head) == (4, 48)


def test_the_planted_fault_grows_the_heads_themselves():
    wide = at("width", 512, parametrisation="growing_heads")
    assert (wide.heads, wide.head) == (2, 256)
    assert wide.parametrisation == "minicpm"  # the table in which the fault is planted


def test_a_deeper_model_is_only_deeper():
    assert at("layers", 16, parametrisation="completep") == replace(BASE, layers=16, parametrisation="completep")


@pytest.mark.parametrize("name", TABLE8)
def test_the_sizes_of_the_paper_by_name(name):
    """Its shape and the released base width, with the experiment's vocabulary (a tokenizer has only so many pieces)."""
    model = at("preset", name)
    assert (model.width, model.feed_forward, model.heads, model.layers) == TABLE8[name]
    assert model.head == 64 and model.dim_model_base == 256 and model.vocabulary == 512
    assert PRESETS[name]["vocabulary"] == 122753


@pytest.mark.parametrize(
    "values, message",
    [
        ([64], r"--widths = 64: expected at least two"),
        ([64, 64], r"--widths = 64,64: expected each value once"),
        ([64, 0], r"--widths = 64,0: .* got 0"),
        ([64, 100], r"--widths: 100: .* divides into heads"),
        ([64, 65], r"--widths: 65: "),
    ],
)
def test_bad_widths_are_named(values, message):
    with pytest.raises(UserError, match=message):
        axis = make_axis("width", values, "--widths")
        for value in axis.values:
            axis.model(BASE, value, "minicpm")


def test_feed_forward_and_odd_heads_are_checked():
    with pytest.raises(UserError, match=r"--widths: 96: .* 81 feed-forward"):
        at("width", 96, replace(BASE, feed_forward=81))
    with pytest.raises(UserError, match=r"--widths: 66: model\.head_width would be 33: expected an even number"):
        at("width", 66, parametrisation="growing_heads", base=replace(BASE, feed_forward=64))


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match=r"--sizes: tunnel-10m: expected one of .*tunnel-9m"):
        at("preset", "tunnel-10m")
