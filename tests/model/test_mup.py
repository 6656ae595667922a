"""The parametrisations against the numbers of MiniCPM-2B, and against each other at m = 1."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model import mup
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, path_name, specs
from cpmjax.model.presets import PRESETS
from cpmjax.run.config import ComputeConfig, ModelConfig
from cpmjax.run.optimizers import AdamW
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import TrainState
from cpmjax.training.step import Rates, make_step, next_token_loss

TWO_B = ModelConfig(**PRESETS["minicpm-2b"])
MATRICES = ("query", "key", "value", "output", "gate", "up", "down")
SMALL = ModelConfig(vocabulary=50, width=16, layers=2, heads=2, feed_forward=40, dim_model_base=16)


def leaves(config, mode="coupled"):
    """{parameter: its scales}"""
    found = {}
    tree = mup.scales(config, AdamW(weight_decay_mode=mode)).leaves
    jax.tree_util.tree_map_with_path(lambda path, _, leaf: found.update({path_name(path): leaf}), specs(config), tree)
    return found


@pytest.mark.smoke
def test_minicpm_2b_numbers():
    """m = 9: matrices start at 0.1 / 3 and learn at 0.01 / 9; embedding and norms keep the full rate; logits / 9."""
    scales = leaves(TWO_B)
    assert scales["layers/gate"].std == pytest.approx(0.1 / 3)
    assert scales["layers/gate"].rate * 0.01 == pytest.approx(0.0011111, abs=1e-7)
    assert scales["embedding"].std == 0.1
    assert scales["embedding"].rate == scales["final_norm"].rate == 1.0
    assert {leaf.epsilon for leaf in scales.values()} == {1.0}
    embedding, residual, logits = mup.multipliers(TWO_B)
    assert embedding == 12
    assert residual == pytest.approx(0.221359, abs=1e-6)
    assert logits == pytest.approx(1 / 9)


def test_table7_scales_embedding_and_norms_as_printed():
    config = replace(TWO_B, parametrisation="minicpm_table7", tied=False)
    scales = leaves(config)
    for name in ("embedding", "head", "layers/query"):
        assert scales[name].rate == pytest.approx(1 / 9)
        assert scales[name].std == pytest.approx(0.1 / 3)
    assert float(initialise(replace(SMALL, parametrisation="minicpm_table7"), jax.random.key(0))["final_norm"][0]) == (
        pytest.approx(0.1)
    )


def test_the_depth_rules_are_minicpm_at_the_base_depth():
    at_base = replace(TWO_B, layers=8)
    for name in ("depth_mup", "completep"):
        config = replace(at_base, parametrisation=name)
        assert mup.multipliers(config) == mup.multipliers(at_base)
        for path, leaf in leaves(config).items():
            epsilon = 1 / 9 if path.split("/")[-1] in MATRICES else 1.0
            assert leaf == replace(leaves(at_base)[path], epsilon=pytest.approx(epsilon)), path


# At four times the base depth, from the formulas of 2505.01618: branches * n ** -a against the base's, rates of a layer
# * n ** (a - 1), epsilon of a matrix * n ** -a / m.
@pytest.mark.parametrize("name, a", [("depth_mup", 0.5), ("completep", 1.0)])
def test_the_depth_rules_follow_their_exponent(name, a):
    base = replace(TWO_B, layers=8, parametrisation=name)
    deep = replace(base, layers=32)
    assert mup.multipliers(deep).residual == pytest.approx(mup.multipliers(base).residual * 4**-a)
    for path, leaf in leaves(deep).items():
        before = leaves(base)[path]
        of_layer = path.startswith("layers/")
        assert leaf.rate == pytest.approx(before.rate * (4 ** (a - 1) if of_layer else 1)), path
        assert leaf.epsilon == pytest.approx(before.epsilon * (4**-a if path.split("/")[-1] in MATRICES else 1)), path
        assert (leaf.mean, leaf.std) == (before.mean, before.std)


def test_weight_decay_modes():
    """Decay a step at rate 0.01 and weight decay 0.1: coupled follows the class's rate, the others do not."""
    coupled, scaled = leaves(TWO_B, "coupled"), leaves(TWO_B, "scaled")
    assert mup.per_step(AdamW(), 1.0) == (0.01, pytest.approx(1e-3))
    assert coupled["layers/up"].decay == pytest.approx(1 / 9) and coupled["embedding"].decay == 1.0
    assert scaled["layers/up"].decay == scaled["embedding"].decay == 1.0
    independent = AdamW(weight_decay_mode="independent", weight_decay=2e-4)
    assert mup.per_step(independent, 0.5) == (pytest.approx(0.005), pytest.approx(1e-4))
    other_peak = replace(independent, learning_rate=0.08)
    assert mup.per_step(other_peak, 0.5)[1] == mup.per_step(independent, 0.5)[1]


def one_step(config):
    optimizer = make_optimizer(config, AdamW())
    parameters = initialise(config, jax.random.key(3))
    state = TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))
    tokens = jax.random.randint(jax.random.key(4), (2, 9), 0, config.vocabulary)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": jnp.broadcast_to(jnp.arange(8), (2, 8)),
        "segments": jnp.ones((2, 8), jnp.int32),
        "weights": jnp.ones((2, 8)),
    }
    step = jax.jit(make_step(config, next_token_loss(config, ComputeConfig(), 0.0), optimizer, 1))
    return step(state, batch, Rates(jnp.float32(0.01), jnp.float32(1e-3)))


def test_minicpm_is_standard_at_the_base_width_bit_for_bit():
    state, metrics = one_step(SMALL)
    standard_state, standard_metrics = one_step(replace(SMALL, parametrisation="standard"))
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(standard_state), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert {k: float(v) for k, v in metrics.items()} == {k: float(v) for k, v in standard_metrics.items()}
    wide, _ = one_step(replace(SMALL, dim_model_base=8))
    assert not np.array_equal(wide.trainable["layers"]["gate"], state.trainable["layers"]["gate"])


def test_first_update_has_each_class_s_own_rate():
    """Adam's first update is the sign of the gradient, so what a matrix moves is exactly its rate (and decay)."""
    config = replace(SMALL, dim_model_base=4)
    before = flat(initialise(config, jax.random.key(3)))
    after = flat(one_step(config)[0].trainable)
    for name, rate in {"layers/gate": 0.01 / 4, "embedding": 0.01, "final_norm": 0.01}.items():
        old, new = np.asarray(before[name], np.float64), np.asarray(after[name], np.float64)
        moved = np.abs(new - old + rate * 0.1 * old)
        assert np.median(moved) == pytest.approx(rate, rel=1e-2), name


def test_initial_scale_and_independence_of_leaves():
    config = ModelConfig(vocabulary=512, width=64, layers=4, heads=4, feed_forward=160, dim_model_base=16)
    parameters = flat(initialise(config, jax.random.key(0)))
    for name, spec in flat(specs(config)).items():
        values = np.asarray(parameters[name])
        assert values.shape == spec.shape and values.dtype == np.float32
        if spec.role == "norm":
            assert (values == 1).all()
        else:
            std = 0.1 if spec.role == "embedding" else 0.05
            assert values.std() == pytest.approx(std, rel=0.03) and abs(values.mean()) < 0.03 * std
    untied = flat(initialise(replace(config, tied=False), jax.random.key(0)))
    for name, values in parameters.items():
        np.testing.assert_array_equal(values, untied[name])


def test_description_states_the_numbers():
    text = mup.describe(TWO_B, AdamW())
    gate = next(line for line in text.splitlines() if line.startswith("layers/gate"))
    assert gate.split("  ")[0] == "layers/gate"
    for number in ("0.033333", "0.11111", "0.001111", "0.000111"):
        assert number in gate
    assert "m = 2304 / 256 = 9" in text
