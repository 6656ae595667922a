"""The model against the original PyTorch code, in float32 (tests/golden)."""

from __future__ import annotations

import json

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model.loss import token_losses
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig

NAMES = ["minicpm-tiny-a", "minicpm-tiny-gqa"]


@pytest.fixture(scope="module", params=NAMES)
def golden(request):
    return request.param, golden_models.load(request.param), golden_models.expected(request.param)


def segments(numbers):
    return jnp.asarray(numbers["attention_mask"], jnp.int32)


@pytest.mark.smoke
def test_logits(golden):
    _, model, numbers = golden
    logits = model(jnp.asarray(numbers["input_ids"], jnp.int32), segments_BL=segments(numbers))
    real = numbers["attention_mask"] == 1
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(logits)[real], numbers["logits"][real], atol=1e-4)


def test_hidden_states_of_every_layer():
    model, numbers = golden_models.load("minicpm-tiny-a"), golden_models.expected("minicpm-tiny-a")
    _, taps = model(
        jnp.asarray(numbers["input_ids"], jnp.int32), None, segments(numbers), ("embedding", "residual", "final")
    )
    real = numbers["attention_mask"] == 1
    layers = model.config.layers
    ours = [taps["embedding"], *taps["residual"][: layers - 1], taps["final"]]
    theirs = [*numbers["hidden_states"], numbers["last_layer_output_before_norm"]]
    for hidden, expected in zip([*ours, taps["residual"][layers - 1]], theirs, strict=True):
        # Entries reach 150, where one unit of float32 is 1.5e-5: the tolerance goes with the size of the layer.
        scale = np.sqrt(np.mean(expected[real] ** 2))
        np.testing.assert_allclose(np.asarray(hidden)[real], expected[real], atol=1e-5 * scale, rtol=1e-5)


def shifted(numbers):
    """The original's labels, shifted as it shifts them: the target of a place is the label of the next."""
    labels = np.concatenate([numbers["labels"][:, 1:], np.full((3, 1), -100)], axis=1)
    return jnp.asarray(np.maximum(labels, 0), jnp.int32), jnp.asarray(labels != -100, jnp.float32)


def mean_loss(parameters, model, numbers):
    model = MiniCPM(model.config, parameters, model.compute)
    tokens = jnp.asarray(numbers["input_ids"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = model.trunk(model.embed(tokens), positions, segments(numbers))
    targets, weights = shifted(numbers)
    return jnp.sum(token_losses(model, hidden, targets).loss * weights) / jnp.sum(weights)


@pytest.mark.parametrize("compute", [
    ComputeConfig(),
    ComputeConfig(remat="block", loss_chunk=15),
    ComputeConfig(remat="dots", unroll=2, loss_chunk=1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_every_gradient(name, compute):
    model, numbers = golden_models.load(name, compute), golden_models.expected(name)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: mean_loss(p, model, numbers)))(model.parameters)
    assert abs(float(loss) - float(numbers["loss"])) < 1e-5
    expected = json.loads((golden_models.GOLDEN / name / "expected_grads.json").read_text())
    compared = 0
    for original, facts in expected["grads"].items():
        gradient = original_gradient(gradients, original)
        np.testing.assert_allclose(np.linalg.norm(gradient), facts["l2"], rtol=1e-4)
        scale = facts["l2"] / np.sqrt(gradient.size)
        np.testing.assert_allclose(gradient.ravel()[:8], facts["first8"], atol=1e-3 * scale, rtol=1e-3)
        compared += gradient.size
    assert compared == sum(x.size for x in jax.tree.leaves(gradients))


def original_gradient(gradients, original):
    name = original.removeprefix("model.").removesuffix(".weight")
    if not name.startswith("layers."):
        return np.asarray(gradients[{"embed_tokens": "embedding", "norm": "final_norm"}[name]])
    _, index, tensor = name.split(".", 2)
    ours = next(key for key, value in golden_models.LAYER_NAMES.items() if value == tensor)
    return np.asarray(gradients["layers"][ours][int(index)]).T


@pytest.mark.parametrize("name, changes", [
    ("theta1e6", {"rope_theta": 1e6}),
    ("linear2", {"rope_scaling": "linear", "rope_factor": 2.0}),
    ("dynamic4_theta1e6_max32", {"rope_theta": 1e6, "rope_scaling": "dynamic", "rope_factor": 4.0, "context": 32}),
    ("dynamic4_max16", {"rope_scaling": "dynamic", "rope_factor": 4.0, "context": 16}),
])  # fmt: skip
def test_rotary_variants(name, changes):
    model = golden_models.load("minicpm-tiny-a", **changes)
    numbers = golden_models.expected("minicpm-tiny-a", "expected_rope_variants.npz")
    logits = model(jnp.asarray(numbers["input_ids"], jnp.int32))
    np.testing.assert_allclose(np.asarray(logits)[0, -4:], numbers[f"last4_logits_{name}"], atol=1e-4)


def test_bfloat16_stays_as_near_as_the_original_does():
    """The original in bf16 moves logits by up to 0.113 and 0.015 on average; a wrong type somewhere moves far more."""
    numbers = golden_models.expected("minicpm-tiny-gqa")
    model = golden_models.load("minicpm-tiny-gqa", ComputeConfig(dtype="bfloat16"))
    logits = np.asarray(model(jnp.asarray(numbers["input_ids"], jnp.int32), segments_BL=segments(numbers)))
    real = numbers["attention_mask"] == 1
    difference = np.abs(logits - numbers["logits"])[real]
    assert difference.max() < 2 * 0.113 and difference.mean() < 2 * 0.015
