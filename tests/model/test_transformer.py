"""Invariants of the forward pass: packing, chunks, scan, taps."""

from __future__ import annotations

from dataclasses import replace

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model.initialise import initialise
from cpmjax.model.loss import token_losses
from cpmjax.model.transformer import TAPS, MiniCPM
from cpmjax.run.config import ComputeConfig, ModelConfig

CONFIG = ModelConfig(vocabulary=97, width=32, layers=3, heads=4, kv_heads=2, feed_forward=80, dim_model_base=16)


@pytest.fixture(scope="module")
def model():
    return MiniCPM(CONFIG, initialise(CONFIG, jax.random.key(0)))


def tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocabulary)


@pytest.mark.smoke
def test_packed_documents_do_not_see_each_other(model):
    """Two documents in a row, positions restarting, give the logits they give alone."""
    row = tokens(2, 20)
    first, second = row[:, :7], row[:, 7:]
    positions = jnp.broadcast_to(jnp.r_[jnp.arange(7), jnp.arange(13)], (2, 20))
    segments = jnp.broadcast_to(jnp.r_[jnp.full(7, 1), jnp.full(13, 2)], (2, 20))
    packed = model(row, positions, segments)
    np.testing.assert_allclose(packed[:, :7], model(first), atol=1e-5)
    np.testing.assert_allclose(packed[:, 7:], model(second), atol=1e-5)
    assert np.abs(packed[:, 7:] - model(row)[:, 7:]).max() > 1e-3


def test_causality(model):
    row = tokens(1, 12)
    changed = row.at[0, 8].add(1)
    before, after = model(row), model(changed % CONFIG.vocabulary)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert not np.array_equal(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("unroll", [2, 3, 99])
def test_unrolling_does_not_change_the_logits(model, unroll):
    unrolled = MiniCPM(CONFIG, model.parameters, ComputeConfig(unroll=unroll))
    np.testing.assert_allclose(unrolled(tokens(2, 9)), model(tokens(2, 9)), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 6, 7, 17, 1000])
def test_chunked_loss_is_the_whole_loss(model, chunk):
    """Against log_softmax of the full logits in float64, for chunks that do and do not divide the length."""
    hidden = jax.random.normal(jax.random.key(1), (3, 10, CONFIG.width))
    targets = tokens(3, 10, seed=2)
    chunked = MiniCPM(CONFIG, model.parameters, ComputeConfig(loss_chunk=chunk))
    losses = jax.jit(token_losses)(chunked, hidden, targets)
    logits = np.asarray(model.head(hidden), np.float64)
    logsumexp = np.log(np.exp(logits).sum(-1))
    expected = logsumexp - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses.loss, expected, atol=1e-5)
    np.testing.assert_allclose(losses.logsumexp, logsumexp, atol=1e-5)
    np.testing.assert_allclose(losses.logit_rms, np.sqrt((logits**2).mean(-1)), rtol=1e-5)


def test_the_vocabulary_never_materialises():
    """MiniCPM-2B's head over 4096 tokens: the compiled gradient holds chunks, not 2 GB of float32 logits."""
    config = ModelConfig(vocabulary=122_753, width=32, layers=1, heads=1, feed_forward=32)
    model = MiniCPM(config, {"embedding": jnp.zeros((config.vocabulary, 32))}, ComputeConfig(loss_chunk=256))

    def loss(model, hidden, targets):
        return token_losses(model, hidden, targets).loss.sum()

    shapes = jax.ShapeDtypeStruct((2, 2048, 32), jnp.float32), jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    compiled = jax.jit(jax.grad(loss, argnums=(1,))).lower(model, *shapes).compile()
    all_logits = 4096 * config.vocabulary * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_logits / 3


def test_taps(model):
    logits, values = model(tokens(2, 6), taps=TAPS)
    assert set(values) == set(TAPS)
    assert values["query"].shape == (3, 2, 6, 4, 8) and values["key"].shape == (3, 2, 6, 2, 8)
    np.testing.assert_array_equal(values["logits"], logits)
    scale = 1.4 / np.sqrt(3)
    stream = values["embedding"]
    for layer in range(3):
        stream = stream + scale * (values["attention"][layer] + values["feed_forward"][layer])
        np.testing.assert_allclose(stream, values["residual"][layer], atol=1e-4)
    with pytest.raises(ValueError, match=r"atention.*attention"):
        model(tokens(1, 4), taps=("atention",))


def test_an_untied_head_is_its_own(model):
    untied = replace(CONFIG, tied=False)
    parameters = {**model.parameters, "head": model.parameters["embedding"].T}
    np.testing.assert_allclose(MiniCPM(untied, parameters)(tokens(1, 5)), model(tokens(1, 5)), atol=1e-6)
    parameters["head"] = 2 * parameters["head"]
    np.testing.assert_allclose(MiniCPM(untied, parameters)(tokens(1, 5)), 2 * model(tokens(1, 5)), atol=1e-5)


def test_compile_once_for_each_shape(model):
    from cpmjax.model.transformer import _forward

    _forward.clear_cache()
    for seed in range(3):
        model(tokens(2, 8, seed))
    model(tokens(1, 8))
    assert _forward._cache_size() == 2


def test_golden_model_is_a_pytree_that_jit_takes():
    golden = golden_models.load("minicpm-tiny-a")
    ids = jnp.asarray(golden_models.expected("minicpm-tiny-a")["input_ids"][:1], jnp.int32)
    np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(golden, ids), golden(ids), atol=1e-5)
