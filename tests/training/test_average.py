"""The average of parameters against the weighted mean that it says it is, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.training.average import moved, new_average


@pytest.mark.parametrize("ema", [0.5, 0.99, 0.99999])
def test_it_is_the_mean_by_age(ema):
    random = np.random.default_rng(0)
    seen = [random.normal(size=7) for _ in range(40)]
    average = new_average({"a": jnp.full(7, 1e3)})  # where training began is no part of it
    update = jax.jit(moved, static_argnums=2)
    for parameters in seen:
        average = update(average, {"a": jnp.asarray(parameters, jnp.float32)}, ema)
    weights = ema ** np.arange(39, -1, -1.0)
    expected = sum(weight * parameters for weight, parameters in zip(weights, seen, strict=True)) / weights.sum()
    np.testing.assert_allclose(np.asarray(average.parameters["a"]), expected, rtol=0, atol=2e-5)
    assert int(average.updates) == 40 and average.parameters["a"].dtype == jnp.float32
