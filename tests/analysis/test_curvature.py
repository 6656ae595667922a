"""Statistics along the way between checkpoints against finite differences in float64, quadrature, and quadratics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double import DOUBLE, SINGLE, batches, direction, double, point
from small_series import imported_history

from cpmjax.analysis import curvature
from cpmjax.analysis.derivatives import Loss, gradients, hvp, in_batches, inner, mean_hvp, wide_parameters
from cpmjax.checkpoint.series import Series
from cpmjax.run.errors import UserError


def moved(parameters, way, share):
    return jax.tree.map(lambda x, v: x + share * v, parameters, way)


def one(many):
    return {key: value[0] for key, value in many.items()}


def relative(found, expected):
    """Distance of two trees as vectors, in units of the second."""
    distance = jax.tree.map(jnp.subtract, found, expected)
    return float(inner(distance, distance) / inner(expected, expected)) ** 0.5


@pytest.fixture(scope="module")
def in_double():
    with double():
        yield


class TestDerivatives:
    def test_hvp_is_the_difference_of_gradients(self, in_double):
        parameters, batch = point(0), one(batches(3))
        way = direction(1, parameters)
        step = 1e-5
        ends = [gradients(DOUBLE, moved(parameters, way, sign * step), batches(3))[1] for sign in (1, -1)]
        expected = jax.tree.map(lambda plus, minus: (plus[0] - minus[0]) / (2 * step), *ends)
        assert relative(hvp(DOUBLE, parameters, way, batch), expected) < 1e-7

    def test_gradient_is_the_difference_of_losses(self, in_double):
        parameters, batch = point(0), one(batches(3))
        way = direction(1, parameters)
        plus, minus = (float(DOUBLE(moved(parameters, way, sign * 1e-5), batch)) for sign in (1, -1))
        _, slopes = gradients(DOUBLE, parameters, batches(3))
        slope = float(inner(way, jax.tree.map(lambda x: x[0], slopes)))
        assert slope == pytest.approx((plus - minus) / 2e-5, rel=1e-7)

    def test_the_hessian_is_symmetric(self, in_double):
        parameters, batch = point(0), one(batches(3))
        first, second = direction(1, parameters), direction(2, parameters)
        found = float(inner(first, hvp(DOUBLE, parameters, second, batch)))
        assert found == pytest.approx(float(inner(second, hvp(DOUBLE, parameters, first, batch))), rel=1e-10)

    def test_float32_is_near_float64(self):
        with double():
            parameters, batch = point(0), one(batches(3))
            exact = jax.device_get(hvp(DOUBLE, parameters, direction(1, parameters), batch))
        parameters, batch = point(0, np.float32), one(batches(3, dtype=np.float32))
        found = jax.device_get(hvp(SINGLE, parameters, direction(1, parameters), batch))
        far = [
            np.linalg.norm(x - y) / np.linalg.norm(y)
            for x, y in zip(*map(jax.tree.leaves, (found, exact)), strict=True)
        ]
        assert max(far) < 1e-4

    def test_batches_together_are_the_mean_over_their_tokens(self, in_double):
        parameters, three = point(0), batches(3)
        way = direction(1, parameters)
        parts = [hvp(DOUBLE, parameters, way, {key: value[k] for key, value in three.items()}) for k in range(3)]
        counts = three["weights"].sum(axis=(1, 2))
        expected = jax.tree.map(lambda *xs: sum(n * x for n, x in zip(counts, xs, strict=True)) / counts.sum(), *parts)
        assert relative(mean_hvp(DOUBLE, parameters, way, three), expected) < 1e-12

    def test_rows_are_dealt_to_batches(self):
        rows = {"tokens": np.arange(12).reshape(6, 2)}
        assert in_batches(rows, 2)["tokens"][:, :, 0].tolist() == [[0, 6], [2, 8], [4, 10]]
        with pytest.raises(UserError, match="6 rows in batches of 4: expected a divisor of 6"):
            in_batches(rows, 4)


class TestSecants:
    def secant(self, length=0.3, count=3):
        first = point(0)
        last = moved(first, direction(1, first), length / 60)
        found = [*curvature.along(DOUBLE, [(10, first), (15, last)], batches(count))]
        assert len(found) == 1
        return first, last, found[0]

    def test_d2_is_the_mean_curvature_along_the_way(self, in_double):
        first, last, secant = self.secant()
        batch = {key: value[1] for key, value in batches(3).items()}
        mean = curvature.mean_curvature(DOUBLE, first, last, batch, points=10)
        assert secant.d2_K[1] == pytest.approx(mean, rel=1e-12)

    def test_five_points_do_between_neighbours(self, in_double):
        first, last, secant = self.secant(length=0.03)
        mean = curvature.mean_curvature(DOUBLE, first, last, one(batches(3)))
        assert secant.d2_K[0] == pytest.approx(mean, rel=1e-12)

    def test_d2_tends_to_the_curvature_at_the_end_as_the_way_gets_shorter(self, in_double):
        errors = []
        for length in (0.2, 0.1, 0.05):
            secant = self.secant(length)[2]
            errors.append(abs(secant.d2_K[0] - secant.exact_K[0]))
        # At first order in the length: halved when it is halved.
        assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
        assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)

    def test_d1_is_the_slope_of_the_loss_along_the_way(self, in_double):
        first, last, secant = self.secant()
        way = jax.tree.map(jnp.subtract, last, first)
        plus, minus = (float(DOUBLE(moved(last, way, share), one(batches(3)))) for share in (1e-5, -1e-5))
        assert secant.d1_K[0] == pytest.approx((plus - minus) / (2e-5 * secant.length), rel=1e-6)

    def test_its_other_numbers(self, in_double):
        first, last, secant = self.secant()
        assert (secant.first, secant.last) == (10, 15)
        one_way = jax.tree.map(jnp.subtract, last, first)
        slopes = [gradients(DOUBLE, at, batches(3))[1] for at in (first, last)]
        g0, g1 = ([jax.tree.map(lambda x, k=k: x[k], slope) for k in range(3)] for slope in slopes)
        for k in range(3):
            assert secant.losses_K[k] == pytest.approx(float(DOUBLE(last, {n: x[k] for n, x in batches(3).items()})))
            assert secant.norms_K[k] == pytest.approx(float(inner(g1[k], g1[k])) ** 0.5)
        norms = [float(inner(g, g)) ** 0.5 for g in (g0[0], g1[2])]
        assert secant.cosines_KK[0, 2] == pytest.approx(float(inner(g0[0], g1[2])) / (norms[0] * norms[1]))
        between = float(inner(g1[2], one_way) - inner(g0[0], one_way)) / secant.length**2
        assert secant.d2_KK[0, 2] == pytest.approx(between)
        assert secant.different.shape == (6,)
        assert secant.different[1] == secant.d2_KK[0, 2]

    def test_without_the_exact_version(self, in_double):
        first = point(0)
        points = [(step, moved(first, direction(1, first), step / 1000)) for step in (1, 2, 4)]
        found = [*curvature.along(DOUBLE, points, batches(3), exact=False)]
        assert [(secant.first, secant.last, secant.exact_K) for secant in found] == [(1, 2, None), (2, 4, None)]

    def test_no_way_at_all_is_refused(self, in_double):
        with pytest.raises(UserError, match="steps 1 and 2 have the same parameters"):
            [*curvature.along(DOUBLE, [(1, point(0)), (2, point(0))], batches(3))]


class TestQuadratic:
    """loss = x' A x / 2 - b' x, with b the batch."""

    def matrix(self):
        draw = np.random.default_rng(0).normal(size=(6, 6))
        return draw + draw.T

    def loss(self, parameters, batch):
        x = jnp.concatenate([parameters["a"], parameters["b"]])
        return x @ jnp.asarray(self.matrix()) @ x / 2 - batch["b"] @ x

    def secant(self, batch, first, last):
        points = [(step, {"a": jnp.asarray(x[:2]), "b": jnp.asarray(x[2:])}) for step, x in ((1, first), (2, last))]
        (found,) = curvature.along(self.loss, points, {"b": jnp.asarray(batch)})
        return found

    def test_d2_is_the_rayleigh_quotient(self, in_double):
        draw = np.random.default_rng(1)
        first, last, batch = draw.normal(size=6), draw.normal(size=6), draw.normal(size=(4, 6))
        secant, v = self.secant(batch, first, last), last - first
        expected = v @ self.matrix() @ v / (v @ v)
        assert secant.d2_K == pytest.approx(np.full(4, expected), rel=1e-12)
        assert secant.exact_K == pytest.approx(np.full(4, expected), rel=1e-12)

    def test_different_batches_add_their_difference_over_the_length(self, in_double):
        draw = np.random.default_rng(1)
        first, v, batch = draw.normal(size=6), draw.normal(size=6), draw.normal(size=(2, 6))
        noise = (batch[0] - batch[1]) @ v / np.linalg.norm(v)
        for length in (1.0, 0.1):
            secant = self.secant(batch, first, first + length * v / np.linalg.norm(v))
            found = secant.d2_KK[0, 1] - secant.d2_K[0]
            assert found == pytest.approx(noise / length, rel=1e-9)
        assert secant.noise_share > 0.9

    def test_without_a_slope_k_is_d2(self, in_double):
        draw = np.random.default_rng(1)
        first, last = draw.normal(size=6), draw.normal(size=6)
        secant = self.secant((self.matrix() @ last)[None].repeat(2, 0), first, last)  # stationary at the end
        assert secant.d1_K == pytest.approx(0, abs=1e-12)
        assert secant.curvature_K == pytest.approx(np.abs(secant.d2_K), rel=1e-12)

    def test_k_is_the_curvature_of_a_curve(self):
        """Of a circle of radius 2, at any point but where it is vertical: 1/2."""
        x = np.array([0.0, 0.5, 1.2])
        slope, second = -x / np.sqrt(4 - x**2), -4 / (4 - x**2) ** 1.5
        assert curvature.curvature(slope, second) == pytest.approx(0.5)


def test_an_import_in_16_bits_is_widened(tmp_path):
    """Gradients, the way and exact products are of float32; D2 of one batch is the mean curvature of the way."""
    series = Series(imported_history(tmp_path))
    assert {leaf.dtype for leaf in jax.tree.leaves(series.parameters(330000))} != {jnp.dtype(jnp.float32)}
    tokens = np.random.default_rng(0).integers(3, 300, (2, 1, 17)).astype(np.int32)
    ones = np.ones((2, 1, 16), np.int32)
    rows = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "segments": ones, "weights": np.float32(ones)}
    rows["positions"] = np.broadcast_to(np.arange(16, dtype=np.int32), ones.shape)
    (found,) = curvature.secants(series, [330000, 390000], rows)
    first, last = (wide_parameters(series, step) for step in (330000, 390000))
    batch = one(rows)
    assert found.d2_K[0] == pytest.approx(curvature.mean_curvature(Loss.of(series), first, last, batch, 7), rel=1e-3)
