"""Linear CKA against its definition in the space of samples, and the lens against the model."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cpmjax import UserError
from cpmjax.analysis.representation import (
    HSIC,
    cka,
    cka_matrix,
    depths,
    drift,
    features,
    hidden_states,
    hsic,
    lens,
    lens_losses,
    lens_rows,
)
from cpmjax.model.initialise import initialise
from cpmjax.model.loss import batch_losses, mean_loss
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ModelConfig

CONFIG = ModelConfig(vocabulary=61, width=32, layers=3, heads=4, kv_heads=2, feed_forward=48, dim_model_base=8)
DRAW = np.random.default_rng(0)


def model(seed=0):
    return MiniCPM(CONFIG, jax.jit(initialise, static_argnums=0)(CONFIG, jax.random.key(seed)))


def batch(rows=3, length=20, padding=0):
    text = np.random.default_rng(1).integers(0, CONFIG.vocabulary, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[:, length - padding :] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
    weights = (segments > 0).astype(np.float32)
    return dict(tokens=text[:, :-1], targets=text[:, 1:], positions=positions, segments=segments, weights=weights)


def normal(*shape):
    return DRAW.standard_normal(shape).astype(np.float32)


def hsic_of_kernels(x, y, debiased):
    """Song et al. 2012, eq. 5, and the biased one, as they are written: n by n kernels, float64."""
    x, y = np.float64(x), np.float64(y)
    k, l, n = x @ x.T, y @ y.T, len(x)  # noqa: E741
    if not debiased:
        centre = np.eye(n) - 1 / n
        return np.trace(k @ centre @ l @ centre)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    found = np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ l.sum(0))
    return found


@pytest.mark.parametrize("debiased", [False, True])
def test_hsic_is_that_of_the_kernels(debiased):
    """In minibatches, of features with means far from zero."""
    x = normal(50, 7) + 3
    y = x[:, :5] @ normal(5, 9) + normal(50, 9) - 5
    total = HSIC()
    for start in (0, 8, 30):
        end = {0: 8, 8: 30, 30: 50}[start]
        total.add(x[start:end], y[start:end])
    expected = hsic_of_kernels(x, y, debiased)
    assert total.value(debiased) == pytest.approx(expected, rel=1e-5)
    assert hsic(x, y, debiased) == pytest.approx(expected, rel=1e-5)
    assert hsic(x, y, debiased) != pytest.approx(hsic_of_kernels(x, y, not debiased), rel=1e-3)


@pytest.mark.parametrize("debiased", [False, True])
def test_what_cka_does_not_see(debiased):
    x, y = normal(3000, 16), normal(3000, 16)
    y += x
    rotation = np.linalg.qr(normal(16, 16))[0]
    assert cka(x, x, debiased) == pytest.approx(1, abs=1e-6)
    assert cka(x, x @ rotation, debiased) == pytest.approx(1, abs=1e-5)
    assert cka(x, -7 * x + 2, debiased) == pytest.approx(1, abs=1e-5)
    assert cka(x, y, debiased) == pytest.approx(cka(y, x, debiased), abs=1e-6)
    assert cka(x, y @ rotation, debiased) == pytest.approx(cka(x, y, debiased), abs=1e-5)
    assert 0.2 < cka(x, y, debiased) < 0.8
    stretched = x * np.linspace(1, 9, 16, dtype=np.float32)  # not a rotation: it sees that
    assert cka(x, stretched, debiased) < 0.95


def test_the_debiased_one_finds_nothing_where_nothing_is():
    """Fewer tokens than 10 times the width: independent features look alike to the biased one."""
    found = [[cka(normal(100, 64), normal(100, 64), debiased) for debiased in (False, True)] for _ in range(20)]
    biased, debiased = np.mean(found, axis=0)
    assert biased > 0.3
    assert abs(debiased) < 0.02


def test_few_tokens_are_refused():
    with pytest.raises(UserError, match="HSIC of 3 tokens; expected at least 4"):
        cka(normal(3, 4), normal(3, 4))


def test_features_are_the_taps_without_padding():
    rows = batch(rows=5, padding=4)
    found = features(model(), rows, rows=2)
    assert found.shape == (len(depths(CONFIG)), 5 * 16, CONFIG.width)
    _, tapped = model()(
        rows["tokens"], rows["positions"], rows["segments"], taps=("embedding", "residual", "final", "logits")
    )
    for place, expected in [(0, tapped["embedding"]), (2, tapped["residual"][1]), (4, tapped["final"])]:
        np.testing.assert_allclose(found[place].reshape(5, 16, -1), expected[:, :16], atol=1e-4)


def test_drift_streams_what_the_matrix_holds():
    """Against the CKA of all hidden states at one time; the step itself has moved nowhere."""
    models = {10: model(0), 20: model(1)}
    series = SimpleNamespace(model=models.get, config=SimpleNamespace(model=CONFIG))
    rows = batch(rows=6)
    found = drift(series, [10, 20], 10, rows, rows=4)
    np.testing.assert_allclose(found[0], 1, atol=1e-5)
    before, after = (features(models[step], rows) for step in (10, 20))
    for depth in range(len(depths(CONFIG))):
        pair = cka_matrix([before[depth], after[depth]])
        assert found[1, depth] == pytest.approx(pair[0, 1], abs=1e-5)
        assert pair[0, 0] == pytest.approx(1) and pair[0, 1] == pair[1, 0]
    assert (found[1] < 0.9).all()


def test_the_last_lens_is_the_model():
    """Also its muP scale: m is 4 here, and without 1/m these would be other logits."""
    rows, this = batch(), model()
    logits = this(rows["tokens"], rows["positions"], rows["segments"])
    states = hidden_states(this, rows)
    np.testing.assert_allclose(lens(this, states[-2]), logits, atol=1e-5)
    assert np.abs(lens(this, states[-3]) - logits).max() > 0.01

    losses = lens_losses(this, rows)
    np.testing.assert_allclose(losses[-1], batch_losses(this, rows).loss, atol=1e-5)
    # Each depth against the formula, in float64.
    x = np.float64(states[1])
    normalised = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_epsilon) * this.parameters["final_norm"]
    scores = normalised @ np.float64(this.parameters["embedding"]).T * CONFIG.dim_model_base / CONFIG.width
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, rows["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(losses[1], expected, atol=1e-5)


def test_lens_rows_are_sums_over_weighted_tokens():
    rows, this = batch(rows=5, padding=3), model()
    found = lens_rows(this, rows, rows=2)
    assert found.shape == (5, CONFIG.layers + 1)
    assert found[:, -1].sum() / rows["weights"].sum() == pytest.approx(float(mean_loss(this, rows)), abs=1e-5)
