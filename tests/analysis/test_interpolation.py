"""Lines, barriers, planes and slices, against what they are by definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis import random_lines as lines

from cpmjax.analysis import geometry, interpolation
from cpmjax.analysis.geometry import Plane
from cpmjax.analysis.interpolation import barrier, between, losses_between, losses_of_mixtures
from cpmjax.analysis.rows import RowLosses
from cpmjax.model.loss import mean_loss
from cpmjax.model.parameters import flat
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig
from cpmjax.run.errors import UserError

COMPUTE = ComputeConfig(attention="chunked", remat="none")
LOSS = RowLosses(lines.MODEL, COMPUTE)
BATCH = lines.batch()
SHARES = np.linspace(-0.5, 1.5, 9)


def plain_loss(parameters) -> float:
    return float(mean_loss(MiniCPM(lines.MODEL, parameters, COMPUTE), BATCH))


def bfloat16(parameters):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Lines.


@pytest.mark.parametrize("kind", [lambda x: x, bfloat16], ids=["float32", "bf16"])
def test_the_ends_of_a_line_are_the_very_checkpoints(kind):
    one, other = kind(lines.tree(1)), kind(lines.tree(2))
    at = jax.jit(between)
    wide = partial(jax.tree.map, lambda x: np.asarray(x, np.float32))
    assert_same(at(one, other, np.float32(0)), wide(one))
    assert_same(at(one, other, np.float32(1)), wide(other))
    assert {leaf.dtype for leaf in jax.tree.leaves(at(one, other, np.float32(0.3)))} == {jnp.dtype(jnp.float32)}


def test_a_line_is_straight_beyond_its_ends_too():
    one, other = lines.tree(1), lines.tree(2)
    for share in SHARES:
        expected = (1 - share) * lines.vector(one) + share * lines.vector(other)
        np.testing.assert_allclose(lines.vector(between(one, other, np.float32(share))), expected, atol=1e-6)


def test_losses_on_a_line():
    one, other = lines.tree(1), lines.tree(2)
    losses_SR = losses_between(LOSS, one, other, SHARES, BATCH)
    assert losses_SR.shape == (len(SHARES), len(BATCH["tokens"]))
    losses_S = losses_SR.mean(1)
    assert losses_S[SHARES == 0] == pytest.approx(plain_loss(one), rel=1e-6)
    assert losses_S[SHARES == 1] == pytest.approx(plain_loss(other), rel=1e-6)
    halfway = jax.tree.map(lambda x, y: (x + y) / 2, one, other)
    assert losses_S[SHARES == 0.5] == pytest.approx(plain_loss(halfway), rel=1e-6)
    assert abs(losses_S[SHARES == 1.25] - losses_S[SHARES == 1]) > 0.01
    assert abs(losses_S[SHARES == -0.25] - losses_S[SHARES == 0]) > 0.01
    np.testing.assert_allclose(losses_between(LOSS, other, one, SHARES, BATCH), losses_SR[::-1], rtol=1e-6)


def test_a_line_of_bf16_checkpoints_is_that_of_their_values_in_float32():
    one, other = bfloat16(lines.tree(1)), bfloat16(lines.tree(2))
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), each) for each in (one, other)]
    np.testing.assert_array_equal(
        losses_between(LOSS, one, other, SHARES, BATCH), losses_between(LOSS, *wide, SHARES, BATCH)
    )


def test_a_line_from_a_checkpoint_to_itself_is_flat():
    losses_SR = losses_between(LOSS, lines.tree(1), lines.tree(1), SHARES, BATCH)
    np.testing.assert_array_equal(losses_SR, np.broadcast_to(losses_SR[0], losses_SR.shape))
    assert barrier(SHARES, losses_SR.mean(1)) == 0


def test_one_program_serves_all_places_and_models_of_one_shape():
    interpolation._loss_between.clear_cache()
    for seed in (1, 2):
        losses_between(RowLosses(lines.MODEL, COMPUTE), lines.tree(seed), lines.tree(3), SHARES, BATCH)
    assert interpolation._loss_between._cache_size() == 1


def test_a_barrier_is_the_rise_above_the_chord_between_the_ends():
    shares = np.array([-0.5, 0, 0.25, 0.5, 1, 1.5])
    losses = np.array([[9.0, 1.0, 2.0, 1.5, 3.0, 9.0], [0.0, 1.0, 0.5, 1.0, 3.0, 0.0]]).T
    np.testing.assert_allclose(barrier(shares, losses), [0.5, 0.0])


# Pairs.


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return lines.write(tmp_path_factory.mktemp("runs") / "trunk", [2, 4, 6])


@pytest.fixture(scope="module")
def decay(trunk):
    return lines.write(trunk.path.parent / "decay", [5, 6], seed=50, parent=trunk, at=4)


def test_barriers_between_checkpoints_of_a_trunk_and_its_branch(trunk, decay):
    places = [(trunk, 2), (trunk, 6), (decay, 4), (decay, 6)]
    found = interpolation.barriers(places, BATCH, inside=3)
    heights = found.heights()
    np.testing.assert_array_equal(np.diag(heights.value), 0)
    np.testing.assert_allclose(heights.value, heights.value.T, atol=1e-12)
    assert (heights.low <= heights.value).all() and (heights.value <= heights.high).all()
    assert heights.value.max() > 0
    for i, (series, step) in enumerate(places):
        assert found.losses_NR[i].mean() == pytest.approx(series.loss(step, BATCH), rel=1e-6)
    one, other = decay.parameters(4), trunk.parameters(6)
    line_SR = losses_between(LOSS, one, other, found.shares_S, BATCH)
    np.testing.assert_allclose(found.losses_SNNR[:, 2, 1], line_SR, rtol=1e-6)
    assert heights.value[1, 2] == pytest.approx(barrier(found.shares_S, line_SR.mean(1)), abs=1e-6)


def test_barriers_between_different_models_are_refused(trunk, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MODEL", replace(lines.MODEL, feed_forward=32))
    wider = lines.write(tmp_path / "wider", [2])
    with pytest.raises(UserError, match=r"wider: another model than .*trunk; expected one model"):
        interpolation.barriers([(trunk, 2), (wider, 2)], BATCH)


# Planes.


def test_a_plane_through_three_checkpoints():
    trees = [lines.tree(seed) for seed in range(6)]
    thetas = np.stack([lines.vector(each) for each in trees])
    plane = Plane.through(geometry.inner_products([lines.as_weights(each) for each in trees]), (4, 1, 3))
    origin, second, third = thetas[[4, 1, 3]]
    x_axis = (second - origin) / np.linalg.norm(second - origin)
    y_axis = third - origin - ((third - origin) @ x_axis) * x_axis
    y_axis /= np.linalg.norm(y_axis)

    # The anchors lie at their coordinates, and the coordinates make the anchors.
    anchors = plane.places_N2[[4, 1, 3]]
    expected = [[(each - origin) @ axis for axis in (x_axis, y_axis)] for each in (origin, second, third)]
    np.testing.assert_allclose(anchors, expected, atol=1e-6)
    np.testing.assert_allclose(plane.mixtures(anchors), np.eye(3), atol=1e-6)
    np.testing.assert_allclose(plane.residuals_N[[4, 1, 3]], 0, atol=1e-6)

    # A checkpoint is its projection and something of the residual's length that stands on the plane.
    for theta, (x, y), residual in zip(thetas, plane.places_N2, plane.residuals_N, strict=True):
        rest = theta - (origin + x * x_axis + y * y_axis)
        assert np.linalg.norm(rest) == pytest.approx(residual, abs=1e-6)
        np.testing.assert_allclose([rest @ x_axis, rest @ y_axis], 0, atol=1e-6)
        mixed = plane.mixtures(np.array([[x, y]]))[0] @ thetas[[4, 1, 3]]
        np.testing.assert_allclose(mixed + rest, theta, atol=1e-6)

    # The loss of a point is that of its parameters.
    losses_PR = losses_of_mixtures(LOSS, [trees[each] for each in (4, 1, 3)], plane.mixtures(anchors), BATCH)
    np.testing.assert_allclose(losses_PR.mean(1), [plain_loss(trees[each]) for each in (4, 1, 3)], rtol=1e-5)


def test_three_checkpoints_on_a_line_span_no_plane():
    one, other = lines.tree(1), lines.tree(2)
    gram = geometry.inner_products([lines.as_weights(each) for each in (one, between(one, other, 0.3), other)])
    with pytest.raises(UserError, match="on a line"):
        Plane.through(gram, (0, 1, 2))


def test_the_grid_of_a_plane_covers_the_projections():
    gram = geometry.inner_products([lines.as_weights(lines.tree(seed)) for seed in range(4)])
    plane = Plane.through(gram, (0, 1, 2))
    x, y = plane.grid(5, 7, margin=0.5)
    assert (len(x), len(y)) == (5, 7)
    for line, values in ((x, plane.places_N2[:, 0]), (y, plane.places_N2[:, 1])):
        extent = np.ptp(values)
        np.testing.assert_allclose([line[0], line[-1]], [values.min() - extent / 2, values.max() + extent / 2])


# Slices.


def test_the_centre_of_a_slice_is_the_checkpoint():
    theta = lines.tree(1)
    directions = [interpolation.random_direction(lines.MODEL, seed) for seed in (0, 1)]
    losses_PR = losses_of_mixtures(LOSS, [theta, *directions], np.array([[1, 0, 0], [1, 0.1, 0]]), BATCH)
    assert losses_PR[0].mean() == pytest.approx(plain_loss(theta), rel=1e-6)
    assert abs(losses_PR[1].mean() - losses_PR[0].mean()) > 1e-3


def test_a_normalised_direction_has_the_length_of_each_filter():
    model = replace(lines.MODEL, tied=False)
    theta = lines.tree(1, model)
    found = flat(interpolation.normalised(model, interpolation.random_direction(model, 0), theta))
    for path, parameter in flat(theta).items():
        assert found[path].shape == parameter.shape
        if path.endswith("norm"):
            np.testing.assert_array_equal(found[path], 0)
        else:  # tokens of the embedding are rows, outputs of a matrix are columns
            lengths = [np.linalg.norm(each, axis=1 if path == "embedding" else -2) for each in (found[path], parameter)]
            np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_a_normalised_slice_does_not_see_scales_that_cancel():
    theta = lines.tree(1)
    direction = interpolation.random_direction(lines.MODEL, 0)
    scales = {"up": 7.0, "down": 1 / 7.0, "value": 0.2, "output": 5.0}
    rescaled = theta | {"layers": {name: leaf * scales.get(name, 1) for name, leaf in theta["layers"].items()}}
    points = np.array([[1, 0], [1, 0.2], [1, -0.3]])
    losses, raw = [], []
    for each in (theta, rescaled):
        along = interpolation.normalised(lines.MODEL, direction, each)
        losses.append(losses_of_mixtures(LOSS, [each, along], points, BATCH))
        raw.append(losses_of_mixtures(LOSS, [each, direction], points, BATCH))
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert np.abs(raw[0] - raw[1]).max() > 1e-2


# Rows.


def test_losses_of_rows():
    theta = lines.tree(1)
    losses_R = np.asarray(LOSS(theta, BATCH))
    assert losses_R.mean() == pytest.approx(plain_loss(theta), rel=1e-6)
    only = BATCH | {"weights": BATCH["weights"] * (np.arange(len(BATCH["weights"])) == 2)[:, None]}
    np.testing.assert_allclose(np.flatnonzero(LOSS(theta, only)), [2])
