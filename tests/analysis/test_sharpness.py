"""The spectrum of a small model's Hessian against dense eigenvalues; P against an update that Adam makes."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double import SINGLE, batches, direction
from flax import serialization
from jax.flatten_util import ravel_pytree

from cpmjax.analysis import sharpness
from cpmjax.analysis.derivatives import Loss, gradients, inner
from cpmjax.analysis.lanczos import lanczos, random_signs, spectral_density, trace
from cpmjax.model.initialise import initialise
from cpmjax.run.config import Config, ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import AdamW, Lion
from cpmjax.training.optimizer import make_optimizer

RATE = 0.01
MODEL = ModelConfig(
    vocabulary=24,
    width=8,
    layers=1,
    heads=2,
    kv_heads=1,
    feed_forward=16,
    dim_model_base=4,
    parametrisation="completep",  # which scales epsilon, too
)


class Series(SimpleNamespace):
    """What the studies ask of a series, from memory."""

    def parameters(self, step):
        return self.point

    def optimizer_state(self, step):
        return self.state

    def learning_rate(self, step):
        return RATE


def series(optimizer=AdamW(), state=None):
    start = initialise(MODEL, jax.random.key(0))
    parameters = jax.tree.map(lambda x, noise: x + 0.02 * noise, start, direction(0, start))
    config = Config(model=MODEL, optimizer=optimizer)
    return Series(path="runs/here", config=config, compute=SINGLE.compute, point=parameters, state=state)


BATCHES = {key: value[..., :24] % 24 for key, value in batches(2, rows=1, dtype=np.float32).items()}


def dense(operator, like):
    """Every column of an operator on trees."""
    flat, unravel = ravel_pytree(like)
    column = jax.jit(lambda e: ravel_pytree(operator(unravel(e)))[0])
    return np.asarray(jax.lax.map(column, jnp.eye(flat.size), batch_size=64), np.float64)


@pytest.fixture(scope="module")
def hessian():
    """(its operator, the same as a matrix)"""
    operator = sharpness.hessian(series(), 1, BATCHES)
    return operator, dense(operator, series().point)


def test_the_hessian_is_that_of_the_loss(hessian):
    """The best that finite differences do in float32 (a step of 0.01) is about 1e-4 of a product's length."""
    _, matrix = hessian
    assert len(matrix) < 5000
    assert np.abs(matrix - matrix.T).max() < 1e-5 * np.abs(matrix).max()
    whole = {key: value.reshape(1, 2, -1) for key, value in BATCHES.items()}
    way = direction(5, series().point)
    loss, length = Loss(MODEL, SINGLE.compute), float(inner(way, way)) ** 0.5
    plus, minus = (
        ravel_pytree(gradients(loss, jax.tree.map(lambda x, v, s=s: x + s * v, series().point, way), whole)[1])[0]
        for s in (0.01 / length, -0.01 / length)
    )
    expected = np.asarray(plus - minus) / (0.02 / length)
    found = matrix @ np.asarray(ravel_pytree(way)[0])
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def test_outermost_values_are_those_of_the_matrix(hessian):
    operator, matrix = hessian
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    found = sharpness.outermost(operator, series().point, 1, most=60, tolerance=1e-4)
    assert found.step == 1
    assert found.top == pytest.approx(values[-1], rel=1e-5)
    assert found.bottom == pytest.approx(values[0], rel=1e-5)
    assert max(found.top_residual, found.bottom_residual) <= 1e-4 * found.top
    assert found.products < 60


def test_trace_and_density_are_those_of_the_matrix(hessian):
    operator, matrix = hessian
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    found, error = trace(operator, series().point, jax.random.key(0), 30)
    assert found == pytest.approx(values.sum(), abs=3 * error)
    density = spectral_density(operator, series().point, jax.random.key(0), 10, 15)
    assert density.size == len(matrix)
    squares = np.array([density.size * probe.values**2 @ probe.weights for probe in density.probes])
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    assert squares.mean() == pytest.approx(np.sum(matrix**2), abs=3 * error)


def test_gauss_newton_is_never_negative(hessian):
    """Where the logits hardly curve, as for the last norm's gains, it is all of the Hessian."""
    operator, matrix = sharpness.gauss_newton(series(), 1, BATCHES), hessian[1]
    found = dense(operator, series().point)
    values = np.linalg.eigvalsh((found + found.T) / 2)
    assert values[0] > -1e-5 * values[-1]
    assert np.linalg.eigvalsh((matrix + matrix.T) / 2)[0] < -0.01 * values[-1]  # the Hessian is not of that kind
    paths = [path for path, leaf in jax.tree_util.tree_leaves_with_path(series().point) for _ in range(leaf.size)]
    gains = [number for number, path in enumerate(paths) if path[0].key == "final_norm"]
    block = np.ix_(gains, gains)
    assert found[block] == pytest.approx(matrix[block], abs=1e-5 * np.abs(matrix[block]).max())


def test_p_divides_the_mean_gradient_to_give_adams_update():
    config = AdamW(beta1=0.0, epsilon=1e-6)  # without momentum the mean gradient is the last one
    optimizer, parameters = make_optimizer(MODEL, config), series().point
    state = optimizer.init(parameters)
    for seed in range(3):
        slope = jax.tree.map(lambda x: 1e-5 * x, direction(seed, parameters))  # below the clip; epsilon matters
        update, state = jax.jit(optimizer.update)(slope, state, parameters, learning_rate=RATE, weight_decay=0.0)
    p = sharpness.preconditioner(series(config, serialization.to_state_dict(state)), 1)
    expected = jax.tree.map(lambda g, p: -RATE * g / p, slope, p)
    for found, wanted in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        assert np.asarray(found) == pytest.approx(np.asarray(wanted), rel=1e-4)


def test_beyond_the_threshold_adams_momentum_diverges_and_below_it_does_not():
    """The rule of the threshold itself: averaged gradients of a quadratic, its curvature in units of it."""
    limit = sharpness.threshold(series(AdamW(beta1=0.9)), 1)
    assert limit == pytest.approx(38 / RATE)
    for share, diverges in ((0.99, False), (1.01, True)):
        x, mean = 1.0, 0.0
        for _ in range(20_000):
            mean = 0.9 * mean + 0.1 * share * limit * x
            x -= RATE * mean
            if abs(x) > 1e6:
                break
        assert (abs(x) > 1e6) is diverges


def test_the_preconditioned_operator(hessian):
    operator, _ = hessian
    p = jax.tree.map(lambda x: 0.5 + x**2, direction(3, series().point))
    scaled = sharpness.preconditioned(operator, p)
    vectors = [random_signs(jax.random.key(seed), p) for seed in (1, 2)]
    first, second = (float(inner(vectors[a], scaled(vectors[b]))) for a, b in ((0, 1), (1, 0)))
    assert first == pytest.approx(second, abs=1e-3 * abs(float(inner(vectors[0], scaled(vectors[0])))))
    four = sharpness.preconditioned(operator, jax.tree.map(lambda x: jnp.full_like(x, 4), p))
    plain = lanczos(operator, vectors[0], 8).values
    assert lanczos(four, vectors[0], 8).values == pytest.approx(plain / 4, abs=1e-5 * plain[-1])


def test_what_has_no_adam_has_no_p():
    assert sharpness.preconditioner(series(), 1) is None
    with pytest.raises(UserError, match="its optimizer is Lion, state_dtype float32; expected AdamW"):
        sharpness.preconditioner(series(Lion(), {"0": {}}), 1)
    with pytest.raises(UserError, match="AdamW, state_dtype int8; expected AdamW"):
        sharpness.preconditioner(series(AdamW(state_dtype="int8"), {"0": {}}), 1)
    assert sharpness.threshold(series(Lion()), 1) is None
