"""The noise scale of gradients whose noise is known, and of the loss of a model."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.analysis.noise_scale import from_two_batches, noise_scale, per_example
from cpmjax.run.errors import UserError

WEIGHTS, SIGNAL = 400, 0.05  # |G|^2
SPREAD_W = np.linspace(0.01, 0.12, WEIGHTS)  # standard deviation of each weight's gradient
NOISE = float(np.sum(SPREAD_W**2))


def gradients(rows, seed=0):
    """Gaussian, of known mean and covariance."""
    rng = np.random.default_rng(seed)
    mean_W = rng.normal(size=WEIGHTS)
    mean_W *= np.sqrt(SIGNAL) / np.linalg.norm(mean_W)
    return mean_W + SPREAD_W * rng.normal(size=(rows, WEIGHTS))


def linear_loss(parameters, row):
    """Its gradient is the row."""
    return jnp.sum(parameters["weights"] * row["gradient"][0])


def measured(gradients_RW, groups=16):
    parameters = {"weights": jnp.ones(WEIGHTS)}
    return noise_scale(linear_loss, parameters, {"gradient": jnp.asarray(gradients_RW, jnp.float32)}, 256, groups)


@pytest.mark.parametrize(("small", "large"), [(1, 8), (4, 64), (16, 1024)])
def test_two_batches_give_the_truth_whatever_their_sizes(small, large):
    """Many pairs of gradients of small and large batches, drawn from their exact distribution."""
    rng = np.random.default_rng(small)
    mean_W = np.full(WEIGHTS, np.sqrt(SIGNAL / WEIGHTS))
    squares = [
        np.mean(np.sum((mean_W + SPREAD_W / np.sqrt(size) * rng.normal(size=(4000, WEIGHTS))) ** 2, axis=1))
        for size in (small, large)
    ]
    signal, noise = from_two_batches(small, squares[0], large, squares[1])
    assert noise / signal == pytest.approx(NOISE / SIGNAL, rel=0.05)
    assert noise == pytest.approx(NOISE, rel=0.02)


def test_the_measurement_recovers_the_planted_noise_scale():
    found = measured(gradients(4096))
    assert found.noise == pytest.approx(NOISE, rel=0.05)
    assert found.signal == pytest.approx(SIGNAL, rel=0.05)
    assert found.batch == pytest.approx(256 * NOISE / SIGNAL, rel=0.05)
    low, high = found.interval
    assert low < found.batch < high < 1.2 * low


def test_every_example_apart_gives_the_same_numbers():
    """The covariance by its definition, and the two-batch estimate with batches of one and of all."""
    gradients_RW = gradients(128)
    signal, noise = per_example(gradients_RW)
    assert np.trace(np.cov(gradients_RW.T)) == pytest.approx(noise, rel=1e-12)
    for groups in (2, 16, 64):
        found = measured(gradients_RW, groups)
        assert found.noise == pytest.approx(noise, rel=1e-4)
        assert found.signal == pytest.approx(signal, rel=1e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    intervals = [measured(gradients(128, seed)).interval for seed in range(60)]
    covered = np.mean([low < 256 * NOISE / SIGNAL < high for low, high in intervals])
    assert covered > 0.85


def test_no_signal_has_no_upper_end():
    gradients_RW = SPREAD_W * np.random.default_rng(0).normal(size=(64, WEIGHTS))
    low, high = measured(gradients_RW).interval
    assert high == np.inf and low > 256 * 20


def test_a_group_too_few():
    with pytest.raises(UserError, match="10 rows in 4 groups; expected a multiple"):
        measured(gradients(10), groups=4)
