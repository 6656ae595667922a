"""Every attention implementation against the plain one, and the plain one against sums written out."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model.attention import Places, attend, attend_chunked, attend_rows


def rows(query, key, value, queries, keys, chunk):
    return attend_rows(query, key, value, keys.segments, chunk)


# More queries than a chunk, in chunks that do and do not divide their number; and no more than a chunk.
ANYWHERE = {f"chunks of {chunk}": partial(attend_chunked, chunk=chunk) for chunk in (4, 5, 12)}
WHOLE_ROWS = {f"rows in chunks of {chunk}": partial(rows, chunk=chunk) for chunk in (4, 5, 12, 513)}
H, K = 4, 8


def places(segments, first=0):
    segments = jnp.asarray(segments, jnp.int32)
    return Places(segments, jnp.broadcast_to(first + jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape))


def packed():
    """Two rows of two documents each, the second one with padding."""
    return places([[1] * 5 + [2] * 7, [1] * 6 + [2] * 3 + [0] * 3])


def with_a_cache():
    """Eight new tokens behind nine; the second row has two of padding."""
    keys = places([[1] * 17, [1] * 15 + [0] * 2])
    return Places(keys.segments[:, 9:], keys.slots[:, 9:]), keys


CASES = {"packed": (packed(), packed()), "cache": with_a_cache()}


def arrays(queries, keys, groups):
    draw = np.random.default_rng(0)
    shapes = [(*queries.segments.shape, H, K), *[(*keys.segments.shape, groups, K)] * 2]
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


def by_hand(query, key, value, queries, keys):
    """In float64, one query at a time, over the keys that it sees alone."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    mixed = np.zeros(query.shape)
    for row, place, head in np.ndindex(*query.shape[:3]):
        seen = (keys.segments[row] == queries.segments[row, place]) & (keys.slots[row] <= queries.slots[row, place])
        group = head // (query.shape[2] // key.shape[2])
        scores = np.exp(key[row, seen, group] @ query[row, place, head] / np.sqrt(K))
        mixed[row, place, head] = scores @ value[row, seen, group] / scores.sum()
    return mixed


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_plain_one_against_sums_by_hand(case, groups):
    queries, keys = CASES[case]
    inputs = arrays(queries, keys, groups)
    np.testing.assert_allclose(attend(*inputs, queries, keys), by_hand(*inputs, queries, keys), atol=1e-5)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(
    ("name", "case"), [*itertools.product(ANYWHERE, CASES), *itertools.product(WHOLE_ROWS, ["packed"])]
)
def test_every_implementation_against_the_plain_one(name, case, groups):
    """Forward, and the gradient of what real tokens draw."""
    queries, keys = CASES[case]
    inputs = arrays(queries, keys, groups)
    weight = jax.random.normal(jax.random.key(1), inputs[0].shape) * (queries.segments > 0)[..., None, None]

    def weighted(function, *inputs):
        mixed = function(*inputs, queries, keys)
        return jnp.sum(mixed * weight), mixed

    value_and_gradient = jax.value_and_grad(weighted, argnums=(1, 2, 3), has_aux=True)
    (_, expected), expected_gradients = value_and_gradient(attend, *inputs)
    (_, found), gradients = jax.jit(value_and_gradient, static_argnums=0)((ANYWHERE | WHOLE_ROWS)[name], *inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_the_second_derivative_of_rows():
    """Forward over reverse, which studies of curvature need."""
    queries, keys = CASES["packed"]
    inputs = arrays(queries, keys, 2)

    def along(function):
        def slope(query):
            return jax.grad(lambda query: jnp.sum(jnp.sin(function(query, *inputs[1:], queries, keys))))(query)

        return jax.jvp(slope, (inputs[0],), (jax.random.normal(jax.random.key(2), inputs[0].shape),))[1]

    np.testing.assert_allclose(along(WHOLE_ROWS["rows in chunks of 5"]), along(attend), atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_chunks_are_never_there_all_at_once(backward):
    length, chunk = 4096, 128

    def loss(query, key, value):
        slots = places(jnp.ones((1, length)))
        return jnp.sum(attend_chunked(query, key, value, slots, slots, chunk=chunk))

    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else loss
    shapes = [jax.ShapeDtypeStruct((1, length, heads, K), jnp.float32) for heads in (H, 2, 2)]
    sizes = jax.jit(function).lower(*shapes).compile().memory_analysis()
    assert sizes.temp_size_in_bytes < 4 * H * length * length / 4  # 1 / 32 is the share of one chunk
