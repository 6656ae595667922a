"""Products with weights of every stored type, against sums in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model.linear import FEW, Narrow, linear


def random_leaf(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(leaf, x):
    return np.tensordot(np.asarray(x, np.float64), np.asarray(leaf.astype(jnp.float32), np.float64), 1)


@pytest.mark.parametrize("inputs", [24, 5000, 9001])  # in one part, in two, in three of unequal sizes
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [(), (1,), (2, FEW // 2), (3, 7)])
def test_a_narrow_leaf_is_multiplied_as_what_it_holds(inputs, dtype, rows):
    leaf, x = random_leaf((inputs, 2, 3), dtype), random_leaf((*rows, inputs), "float32", 1)
    found = jax.jit(linear)(Narrow.of(leaf), x)
    assert found.dtype == x.dtype and found.shape == (*rows, 2, 3)
    np.testing.assert_allclose(found, exact(leaf, x), rtol=1e-5, atol=1e-5 * np.sqrt(inputs))
    np.testing.assert_allclose(linear(leaf, x), exact(leaf, x), rtol=1e-5, atol=1e-5 * np.sqrt(inputs))


def test_a_narrow_leaf_widens_to_the_leaf():
    leaf = random_leaf((9001, 2, 3), "bfloat16")
    np.testing.assert_array_equal(Narrow.of(leaf).wide(jnp.dtype("float32")), leaf.astype(jnp.float32))


def test_outputs_of_a_narrow_leaf_are_looked_up():
    leaf, outputs = random_leaf((9001, 6), "float16"), jnp.asarray([[5, 0], [2, 2]])
    found = Narrow.of(leaf).of_outputs(outputs, jnp.dtype("float32"))
    np.testing.assert_array_equal(found, leaf.astype(jnp.float32).T[np.asarray(outputs)])
