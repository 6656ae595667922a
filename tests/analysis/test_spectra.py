"""Spectra against numpy's dense SVD, and the invariants of ranks and angles."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from analysis.synthetic import MODEL, parameters

from cpmjax.analysis import spectra
from cpmjax.run.config import ModelConfig

SHAPES = [(24, 40), (40, 24), (32, 32)]


def matrix(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def basis(*shape, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal(shape))[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2**24, 100])  # at once, and in blocks the last of which is short
def test_singular_values_and_directions_are_those_of_the_dense_svd(monkeypatch, shape, block):
    monkeypatch.setattr(spectra, "_BLOCK", block)
    weights = matrix(*shape)
    u, values, vt = np.linalg.svd(weights.astype(np.float64), full_matrices=False)
    for directions in (0, 3):
        found = spectra.spectrum(weights, directions)
        assert found.values_R == pytest.approx(values, rel=1e-9)
    parts = spectra.spectrum(weights + matrix(*shape, seed=1), minus_IO=matrix(*shape, seed=1))
    assert parts.values_R == pytest.approx(values, rel=1e-5)
    assert found.input_IK.shape == (shape[0], 3) and found.output_OK.shape == (shape[1], 3)
    for ours, dense in ((found.input_IK, u[:, :3]), (found.output_OK, vt[:3].T)):
        assert ours.T @ ours == pytest.approx(np.eye(3), abs=1e-12)
        assert spectra.principal_angles(ours, dense) == pytest.approx(np.zeros(3), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_of_singular_values_sum_to_the_squared_norm(shape):
    for kind in (np.float32, ml_dtypes.bfloat16):
        weights = matrix(*shape).astype(kind)
        squares = (spectra.spectrum(weights).values_R ** 2).sum()
        assert squares == pytest.approx((weights.astype(np.float64) ** 2).sum(), rel=1e-12)


def test_small_singular_values_keep_their_digits():
    planted = np.array([1.0, 1e-2, 1e-4, 1e-6])
    weights = basis(50, 4) * planted @ basis(30, 4, seed=1).T
    found = spectra.spectrum(weights).values_R
    assert found[:4] == pytest.approx(planted, rel=1e-4)
    assert found[4:].tolist() == [0] * 26  # what rounding made is not taken for a rank


def test_ranks_of_an_identity_and_of_an_outer_product():
    for size in (1, 7, 64):
        values = spectra.spectrum(3 * np.eye(size)).values_R
        assert spectra.stable_rank(values) == pytest.approx(size) and spectra.effective_rank(values) == pytest.approx(
            size
        )
    values = spectra.spectrum(np.outer(matrix(300), matrix(200, seed=1))).values_R
    assert spectra.stable_rank(values) == pytest.approx(1, abs=1e-9)
    assert spectra.effective_rank(values) == pytest.approx(1, abs=1e-9)
    assert np.isnan(spectra.stable_rank(np.zeros(4))) and np.isnan(spectra.effective_rank(np.zeros(4)))


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_do_not_depend_on_scale_and_lie_below_the_rank(shape):
    values = spectra.spectrum(matrix(*shape)).values_R
    for rank in (spectra.stable_rank, spectra.effective_rank):
        assert rank(17 * values) == pytest.approx(rank(values))
        assert 1 < rank(values) < min(shape)
        assert rank(np.stack([values, values[::-1]])) == pytest.approx([rank(values)] * 2)  # of each row


def test_the_mup_norm_is_the_same_at_every_width_of_a_mup_initialisation():
    norms = []
    for width in (64, 256):
        weights = matrix(width, 3 * width) / width**0.5
        norms.append(spectra.mup_norm(spectra.spectrum(weights).values_R[0], *weights.shape))
        assert norms[-1] == pytest.approx((1 + 3**0.5) / 3**0.5, rel=0.05)  # Marchenko and Pastur
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_angles_of_equal_orthogonal_and_turned_subspaces():
    space = basis(20, 8)
    one, orthogonal, mixing = space[:, :4], space[:, 4:], basis(4, 4, seed=2)
    assert spectra.principal_angles(one, one @ mixing) == pytest.approx(np.zeros(4), abs=1e-12)
    assert spectra.principal_angles(one, orthogonal) == pytest.approx(np.full(4, np.pi / 2))
    assert spectra.overlap(one, one @ mixing) == pytest.approx(1) and spectra.overlap(one, orthogonal) < 1e-12
    angles = np.array([1e-10, 1e-3, 0.5, 1.5])
    turned = (one * np.cos(angles) + orthogonal * np.sin(angles)) @ mixing
    assert spectra.principal_angles(one, turned) == pytest.approx(angles, rel=1e-5)
    assert spectra.principal_angles(turned, one) == pytest.approx(angles, rel=1e-5)
    assert spectra.overlap(one, turned) == pytest.approx((np.cos(angles) ** 2).mean())


def test_random_subspaces_overlap_by_their_share_of_the_dimensions():
    found = [spectra.overlap(basis(100, 10, seed=seed), basis(100, 10, seed=seed + 50)) for seed in range(20)]
    assert np.mean(found) == pytest.approx(0.1, abs=0.01)


def test_products_of_heads_are_those_of_the_dense_matrices():
    config, tree = ModelConfig(**MODEL), parameters(0)["layers"]
    layer = {name: stacked[1] for name, stacked in tree.items()}
    found = spectra.circuits(config, layer)
    width, repeats = config.head, config.heads // config.kv
    gain = np.diag(layer["attention_norm"].astype(np.float64))
    for head in range(config.heads):
        own = slice(head * width, (head + 1) * width)
        group = slice(head // repeats * width, (head // repeats + 1) * width)
        qk = gain @ layer["query"][:, own] @ layer["key"][:, group].T @ gain / width**0.5
        ov = gain @ layer["value"][:, group] @ layer["output"][own]
        for name, dense in (("qk", qk), ("ov", ov)):
            values = np.linalg.svd(dense, compute_uv=False)
            assert found[name][head] == pytest.approx(values[:width], rel=1e-6)
            assert values[width:] == pytest.approx(np.zeros(config.width - width), abs=1e-6 * values[0])
