"""Lanczos, quadrature and trace against dense eigenvalues of matrices whose vectors are trees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double import double

from cpmjax.analysis.lanczos import lanczos, random_signs, spectral_density, trace

LIKE = {"a": jnp.zeros((5, 8)), "b": {"c": jnp.zeros(20)}}
SIZE = 60


@pytest.fixture(autouse=True)
def in_double():
    with double():
        yield


def as_tree(x):
    return {"a": x[:40].reshape(5, 8), "b": {"c": x[40:]}}


def as_vector(tree):
    return jnp.concatenate([tree["a"].reshape(-1), tree["b"]["c"]])


def symmetric(values):
    """(operator, dense matrix) with these eigenvalues."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
    dense = turn @ np.diag(values) @ turn.T
    return (lambda tree: as_tree(jnp.asarray(dense) @ as_vector(tree))), dense


def start(seed=0):
    return as_tree(jnp.asarray(np.random.default_rng(seed).normal(size=SIZE)))


VALUES = np.concatenate([[-3.0, -0.5], np.linspace(-0.1, 0.1, SIZE - 5), [1.0, 4.0, 5.0]])


@pytest.mark.smoke
def test_outer_values_come_first():
    operator, _ = symmetric(VALUES)
    found = lanczos(operator, start(), 20)
    assert found.top == pytest.approx(5, abs=1e-9)
    assert found.bottom == pytest.approx(-3, abs=1e-9)
    assert found.values[-3:] == pytest.approx([1, 4, 5], abs=1e-5)


def test_every_residual_bounds_the_distance_to_an_eigenvalue():
    operator, _ = symmetric(VALUES)
    for most in (2, 5, 9):
        found = lanczos(operator, start(), most)
        distance = np.abs(found.values[:, None] - VALUES).min(axis=1)
        assert np.all(distance <= found.residuals + 1e-12)
        assert found.residuals.max() > 1e-6


def test_it_stops_when_what_is_wanted_is_near_enough():
    operator, _ = symmetric(VALUES)
    loose, tight, top = (
        lanczos(operator, start(), SIZE, tolerance, ends)
        for tolerance, ends in ((1e-1, "both"), (1e-8, "both"), (1e-8, "top"))
    )
    assert len(loose.values) < len(tight.values) < SIZE
    assert len(top.values) <= len(tight.values)
    assert tight.residuals[[0, -1]].max() <= 5e-8
    assert loose.residuals[[0, -1]].max() <= 0.5


def test_all_the_way_it_finds_every_value_once_without_ghosts():
    operator, dense = symmetric(VALUES)
    found = lanczos(operator, start(), SIZE)
    assert found.values == pytest.approx(np.linalg.eigvalsh(dense), abs=1e-10)


def test_it_stops_where_the_krylov_space_ends():
    operator, _ = symmetric(np.where(np.arange(SIZE) < 30, -2.0, 7.0))
    found = lanczos(operator, start(), 20)
    assert found.values == pytest.approx([-2, 7])
    assert found.residuals == pytest.approx([0, 0], abs=1e-10)


def test_a_shift_moves_every_value_by_itself():
    operator, _ = symmetric(VALUES)
    plain = lanczos(operator, start(), 12)
    moved = lanczos(lambda tree: jax.tree.map(lambda a, x: a + 2.5 * x, operator(tree), tree), start(), 12)
    assert moved.values == pytest.approx(plain.values + 2.5, abs=1e-9)
    assert moved.weights == pytest.approx(plain.weights, abs=1e-7)


class TestDensity:
    def density(self, probes=6, steps=20):
        operator, dense = symmetric(VALUES)
        return spectral_density(operator, LIKE, jax.random.key(0), probes, steps), dense

    def test_weights_are_a_distribution(self):
        density, _ = self.density()
        assert density.size == SIZE
        for found in density.probes:
            assert found.weights.sum() == pytest.approx(1, abs=1e-12)
            assert np.all(found.weights >= 0)

    def test_a_probe_gives_the_moments_of_the_matrix_about_itself(self):
        """Quadrature with m nodes is exact up to degree 2 m - 1."""
        operator, dense = symmetric(VALUES)
        probe = random_signs(jax.random.key(3), LIKE)
        found = lanczos(operator, probe, 4)
        z = np.asarray(as_vector(probe)) / np.sqrt(SIZE)
        for degree in range(8):
            expected = z @ np.linalg.matrix_power(dense, degree) @ z
            assert found.values**degree @ found.weights == pytest.approx(expected, rel=1e-9)

    def test_on_a_grid_its_integral_is_one_and_its_mass_where_the_values_are(self):
        density, _ = self.density(probes=30)
        grid = np.linspace(-5, 7, 2401)
        drawn = density.on_grid(grid, 0.1)
        step = grid[1] - grid[0]
        assert drawn.sum() * step == pytest.approx(1, abs=1e-6)
        expected = np.exp(-((grid[:, None] - VALUES) ** 2) / 0.02).mean(axis=1) / (0.1 * np.sqrt(2 * np.pi))
        assert np.abs(drawn - expected).sum() * step < 0.1
        assert density.share_below(-0.2) == pytest.approx(2 / SIZE, abs=0.02)

    def test_its_trace_is_that_of_hutchinson_with_the_same_probes(self):
        density, _ = self.density(probes=8, steps=10)
        operator, _ = symmetric(VALUES)
        assert density.trace() == pytest.approx(trace(operator, LIKE, jax.random.key(0), 8), rel=1e-10)


def test_the_trace_is_the_sum_of_eigenvalues_within_its_error():
    operator, dense = symmetric(VALUES)
    found, error = trace(operator, LIKE, jax.random.key(1), 64)
    assert found == pytest.approx(np.trace(dense), abs=3 * error)
    # Of random signs the variance is 2 * the sum of squares beside the diagonal.
    beside = dense - np.diag(np.diag(dense))
    assert error == pytest.approx(np.sqrt(2 * np.sum(beside**2) / 64), rel=0.4)


def test_signs_are_signs():
    signs = random_signs(jax.random.key(0), LIKE)
    assert jax.tree.map(jnp.shape, signs) == jax.tree.map(jnp.shape, LIKE)
    assert set(np.unique(as_vector(signs))) == {-1.0, 1.0}
