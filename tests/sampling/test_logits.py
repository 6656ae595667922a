"""Penalties, filters and draws against plain numpy in float64, with sorts; frequencies; batches; edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from cpmjax.sampling import logits as sampling
from cpmjax.sampling.options import make_options

RELEASED = 122_753  # the vocabulary of MiniCPM-2B
FILTERS = ("top_k", "top_p", "min_p", "typical_p")
OFF = {"top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1}

choose = jax.jit(sampling.choose)


@jax.jit
def weights(logits, options):
    """The integer probabilities that a token is drawn from, [B, V]."""
    distance = sampling._distance(logits, jnp.max(logits, axis=-1, keepdims=True), options.temperature_B)
    return sampling._weights(distance, options).reshape(logits.shape[0], -1)[:, : logits.shape[1]]


def nearest(distance, mass, target):
    """-> (the nearest tokens that hold the target, ties of the last one with them; by how much it is these)."""
    order = np.argsort(distance, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(mass, order, 1), axis=1)
    last = np.minimum((held < target[:, None]).sum(1), held.shape[1] - 1)
    limit = np.take_along_axis(distance, np.take_along_axis(order, last[:, None], 1), 1)
    return distance <= limit, np.abs(held - target[:, None]).min(1)


def oracle(logits, temperature, top_k, top_p, min_p, typical_p):
    """-> (probabilities [B, V] in float64, margin [B]: how far the closest decision was from falling otherwise)."""
    distance = (logits.max(1, keepdims=True) - logits) / temperature[:, None]  # in float32: here it is seen what ties
    assert distance.dtype == np.float32
    distance = distance.astype(np.float64)
    p = np.exp(-distance)

    def renormalised(kept):
        return np.where(kept, p, 0) / np.where(kept, p, 0).sum(1, keepdims=True)

    kept, _ = nearest(distance, np.ones_like(p), np.where(top_k > 0, top_k, p.shape[1]).astype(float))
    nucleus, margin = nearest(distance, renormalised(kept), np.where(top_p < 1, top_p.astype(float), 2))
    kept &= nucleus
    margin = np.minimum(margin, np.where(kept & (min_p[:, None] > 0), np.abs(p - min_p[:, None]), 1).min(1))
    kept &= p >= min_p[:, None]
    share = renormalised(kept)
    surprise = np.abs(-special.xlogy(np.sign(share), np.where(kept, share, 1)) - special.entr(share).sum(1)[:, None])
    surprise = np.where(kept, surprise, np.inf)
    typical, by = nearest(surprise, share, np.where(typical_p < 1, typical_p.astype(float), 2))
    inside = np.where(typical & kept, surprise, -np.inf).max(1)
    outside = np.where(typical | ~kept, np.inf, surprise).min(1)
    return renormalised(kept & typical), np.minimum(np.minimum(margin, by), outside - inside)


def random_options(generator, rows):
    """Each filter on in about half of the rows, so that all combinations come up."""
    drawn = {
        "top_k": generator.integers(1, 40, rows),
        "top_p": generator.uniform(0.01, 1, rows),
        "min_p": generator.uniform(0, 0.5, rows) ** 2,
        "typical_p": generator.uniform(0.01, 1, rows),
    }
    named = {name: np.where(generator.random(rows) < 0.5, drawn[name], OFF[name]) for name in FILTERS}
    named["top_p"], named["min_p"], named["typical_p"] = (
        named[name].astype(np.float32) for name in ("top_p", "min_p", "typical_p")
    )
    return named | {"temperature": generator.uniform(0.2, 3, rows).astype(np.float32)}


@pytest.mark.parametrize("rows, vocabulary, grid", [(10_000, 61, None), (10_000, 61, 0.5), (6, RELEASED, None)])
def test_filters_against_sorting(rows, vocabulary, grid):
    """With a grid most logits are in a tie."""
    generator = np.random.default_rng(vocabulary + rows)
    logits = generator.normal(size=(rows, vocabulary)).astype(np.float32) * 3
    if grid:
        logits = np.round(logits / grid) * np.float32(grid)
    named = random_options(generator, rows)
    got = np.asarray(weights(jnp.asarray(logits), make_options(rows, vocabulary, **named)), np.float64)
    probabilities, margin = oracle(logits, **named)
    clear = margin > 1e-6
    assert clear.mean() > (0.99 if vocabulary == 61 else 0.5)
    # A weight of 2^-30 is the least there is; below it nothing tells a filtered token from an improbable one.
    seen = probabilities > 1e-8
    assert (got[clear] > 0)[seen[clear]].all()
    assert not got[clear][probabilities[clear] == 0].any()
    share = got / got.sum(1, keepdims=True)
    unit = 1 / got.sum(1, keepdims=True)
    assert (np.abs(share - probabilities) < unit + 3e-6 * probabilities + 1e-9)[clear].all()


def test_all_tokens_in_a_tie_for_the_last_place_stay():
    logits = jnp.log(jnp.asarray([[1 / 8, 1 / 4, 1 / 8, 1 / 4, 1 / 4]]))
    for named, kept in [
        ({"top_k": 1}, [1, 3, 4]),
        ({"top_k": 4}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.2}, [1, 3, 4]),
        ({"top_p": 0.76}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.6}, [1, 3, 4]),
        # The entropy is 1.125 log 4, nearer to -log 1/4 than to -log 1/8.
        ({"typical_p": 1e-45}, [1, 3, 4]),
        ({"typical_p": 0.3}, [1, 3, 4]),
        ({"typical_p": 0.76}, [0, 1, 2, 3, 4]),
    ]:
        assert np.flatnonzero(weights(logits, make_options(1, 5, **named))[0]).tolist() == kept, named


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": {3: 2.0, 11: -np.inf, 299: 4.0}},
    {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9, "presence_penalty": 0.5},
]


@jax.jit
def draw(logits, options, positions):
    """A token of one row at each of many positions."""
    return jax.vmap(lambda position: sampling.choose(logits, options, position[None])[0])(positions)


@pytest.mark.parametrize("named", SETTINGS, ids=lambda named: "-".join(named) or "plain")
def test_a_million_draws_follow_the_probabilities(named):
    vocabulary, draws = 300, 1_000_000
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(1, vocabulary)).astype(np.float32) * 2
    prompt, counts = generator.random((1, vocabulary)) < 0.3, generator.integers(0, 3, (1, vocabulary))
    options = make_options(1, vocabulary, seed=5, **named)
    adjusted = sampling.adjust(jnp.asarray(logits), options, jnp.asarray(prompt), jnp.asarray(counts, jnp.int32))
    tokens = draw(adjusted, options, jnp.arange(draws, dtype=jnp.int32))
    filters = {name: named.get(name, off) for name, off in (OFF | {"temperature": 1}).items()}
    expected, _ = oracle(
        penalised(logits, prompt, counts, **named).astype(np.float32),
        **{name: np.asarray([value], np.float32) for name, value in filters.items()},
    )
    expected = expected[0] * draws
    observed = np.bincount(np.asarray(tokens), minlength=vocabulary)
    assert not observed[expected == 0].any()
    rare = expected < 5  # together, as the statistic needs
    observed = np.append(observed[~rare], observed[rare].sum())[: (~rare).sum() + (expected[rare].sum() > 0)]
    expected = np.append(expected[~rare], expected[rare].sum())[: len(observed)]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


def penalised(
    logits,
    prompt,
    counts,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias=None,
    **_,
):
    """One row or more with the same penalties, token by token."""
    adjusted = logits.astype(np.float64)
    for row, token in np.ndindex(logits.shape):
        value, count = adjusted[row, token], counts[row, token]
        if prompt[row, token] or count:
            value = value / repetition_penalty if value > 0 else value * repetition_penalty
        value -= frequency_penalty * count + (presence_penalty if count else 0)
        adjusted[row, token] = value + (logit_bias or {}).get(token, 0)
    return adjusted


def test_penalties_and_bias_row_by_row():
    generator = np.random.default_rng(2)
    rows, vocabulary = 4, 50
    logits = generator.normal(size=(rows, vocabulary)).astype(np.float32)
    prompt, counts = generator.random((rows, vocabulary)) < 0.3, generator.integers(0, 3, (rows, vocabulary))
    by_row = [
        {},
        {"repetition_penalty": 1.3, "logit_bias": {49: -5.0}},
        {"presence_penalty": 0.5, "frequency_penalty": -0.25},
        {"repetition_penalty": 0.8, "frequency_penalty": 0.5, "logit_bias": {0: 1.5, 7: -np.inf, 8: 3.0}},
    ]
    named = {
        name: [row.get(name, off) for row in by_row]
        for name, off in {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}.items()
    } | {"logit_bias": [row.get("logit_bias") for row in by_row]}
    options = make_options(rows, vocabulary, **named)
    adjusted = jax.jit(sampling.adjust)(
        jnp.asarray(logits), options, jnp.asarray(prompt), jnp.asarray(counts, jnp.int32)
    )
    for row, named in enumerate(by_row):
        one = slice(row, row + 1)
        np.testing.assert_allclose(adjusted[one], penalised(logits[one], prompt[one], counts[one], **named), rtol=1e-6)
    np.testing.assert_array_equal(adjusted[0], logits[0])


def test_greedy_takes_the_largest_and_of_equal_ones_the_first():
    generator = np.random.default_rng(3)
    logits = np.round(generator.normal(size=(500, 97)) * 2).astype(np.float32)
    options = make_options(500, 97, temperature=0, top_k=3, seed=range(500))
    tokens = choose(jnp.asarray(logits), options, jnp.zeros(500, jnp.int32))
    np.testing.assert_array_equal(tokens, logits.argmax(1))


def test_a_row_with_nan_gets_a_token_and_disturbs_no_other():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 37)), jnp.float32)
    for temperature in (0, 1):
        options = make_options(2, 37, temperature=temperature, top_p=0.9)
        expected = choose(logits, options, jnp.zeros(2, jnp.int32))
        tokens = choose(logits.at[0, 5].set(jnp.nan), options, jnp.zeros(2, jnp.int32))
        assert tokens.tolist() == [0, expected[1]]


def mixed_batch(rows, vocabulary):
    generator = np.random.default_rng(4)
    named = random_options(generator, rows)
    named["temperature"][generator.random(rows) < 0.2] = 0
    logits = jnp.asarray(generator.normal(size=(rows, vocabulary)) * 2, jnp.float32)
    options = make_options(rows, vocabulary, seed=generator.integers(0, 2**32, rows), **named)
    return logits, options, jnp.asarray(generator.integers(0, 4096, rows), jnp.int32)


def test_a_row_does_not_depend_on_the_batch_around_it():
    batch = jax.tree.map(np.asarray, mixed_batch(256, 1009))
    tokens = np.asarray(choose(*batch))

    def at(rows):
        return np.asarray(choose(*jax.tree.map(lambda leaf: leaf[rows], batch)))

    alone = [at(np.asarray([row]))[0] for row in range(0, 256, 4)]
    np.testing.assert_array_equal(alone, tokens[::4])
    elsewhere = np.random.default_rng(5).permutation(256)
    np.testing.assert_array_equal(at(elsewhere), tokens[elsewhere])
    np.testing.assert_array_equal(at(elsewhere[:3]), tokens[elsewhere[:3]])


def test_rows_one_by_one_or_all_at_once_give_the_same_tokens():
    """As on a CPU and as on an accelerator."""
    batch = mixed_batch(256, 1009)
    np.testing.assert_array_equal(jax.jit(sampling._choose)(*batch), choose(*batch))


def test_a_seed_and_a_position_say_it_all():
    logits = jnp.tile(jnp.asarray(np.random.default_rng(6).normal(size=(1, 1009)), jnp.float32), (256, 1))

    def tokens(seed, position):
        positions = np.broadcast_to(np.asarray(position, np.int32), 256)
        return choose(logits, make_options(256, 1009, seed=seed), positions)

    by_seed, by_position = tokens(range(256), 0), tokens(7, range(256))
    np.testing.assert_array_equal(by_seed, tokens(range(256), 0))
    assert (tokens(7, 3) == by_position[3]).all()
    assert len(set(by_seed.tolist())) > 100 and len(set(by_position.tolist())) > 100


def test_one_program_serves_any_options():
    fresh = jax.jit(lambda *arguments: sampling.choose(*arguments))
    for named in (*SETTINGS[:7], {"temperature": 0}, {"logit_bias": {1: 1.0}}):
        fresh(jnp.zeros((2, 300)), make_options(2, 300, **named), jnp.zeros(2, jnp.int32))
    assert fresh._cache_size() == 1


@pytest.mark.parametrize("vocabulary", [5, RELEASED])
def test_every_number_below_the_total_falls_on_a_token_with_mass(vocabulary):
    """Where one token ends the next begins, and the largest number falls on the last token that has mass."""
    generator = np.random.default_rng(7)
    columns = generator.integers(0, 3, vocabulary).astype(np.int32) * 5_000
    columns[-1] = 0
    ends = np.cumsum(columns)
    drawn = np.concatenate([generator.integers(0, ends[-1], 50), ends[ends < ends[-1]][-50:], [0, ends[-1] - 1]])
    drawn = drawn.astype(np.int32)
    found, rest = jax.jit(jax.vmap(lambda number: sampling._locate(columns[None], number[None])))(drawn)
    expected = np.searchsorted(ends, drawn, side="right")
    np.testing.assert_array_equal(found[:, 0], expected)
    np.testing.assert_array_equal(rest[:, 0], drawn - (ends - columns)[expected])
    assert (columns[expected] > 0).all()


def test_shares_of_the_total_are_exact():
    generator = np.random.default_rng(9)
    totals, fractions = generator.integers(1, 2**31, 10_000), generator.integers(0, 2**32, 10_000)
    totals[:3], fractions[:3] = (1, 2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1, 0)
    got = jax.jit(sampling._multiply)(totals.astype(np.int32), fractions.astype(np.uint32))
    np.testing.assert_array_equal(got, totals * fractions.astype(object) // 2**32)


EDGES = {
    "temperature": [0, 1e-45, 1e-38, 1e-6, 1, 1e6, 3e38],
    "top_k": [0, 1, 36, 37, 38, 2**31 - 1],
    "top_p": [1e-45, 1e-38, 1e-9, 0.5, 1 - 2**-24, 1],
    "min_p": [0, 1e-45, 1e-38, 1e-9, 0.5, 1 - 2**-24],
    "typical_p": [1e-45, 1e-9, 0.5, 1 - 2**-24, 1],
    "seed": [0, 1, 2**32 - 1],
}


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({name: st.sampled_from(values) for name, values in EDGES.items()}),
    st.lists(st.sampled_from([-np.inf, -3e38, -1e30, -5.0, 0.0, 1e-40, 1.0, 1e30, 3e38]), min_size=37, max_size=37),
    st.integers(0, 36),
)
def test_edges(named, values, place):
    """Some token of finite logit is chosen, and the most probable one where nothing else can be."""
    values[place] = max(values[place], -5.0)
    one = np.full(37, -np.inf)
    one[place] = values[place]
    logits = jnp.asarray([values, one], jnp.float32)
    chosen, only = choose(logits, make_options(2, 37, **named), jnp.zeros(2, jnp.int32)).tolist()
    assert np.isfinite(values[chosen]) and only == place
    if named["top_p"] < 1e-6 or named["min_p"] > 0.9 or named["top_k"] == 1 or named["temperature"] == 0:
        highest = np.asarray(logits[0]).max()
        # Finite logits that a huge temperature makes equal are in a tie.
        assert values[chosen] == highest or named["temperature"] >= 1e6


def test_log_probabilities():
    generator = np.random.default_rng(8)
    logits = generator.normal(size=(5, 400)).astype(np.float32) * 4
    logits[:, 100:200] = -np.inf
    expected = special.log_softmax(logits.astype(np.float64), axis=1)
    tokens = np.asarray([3, 99, 250, 399, 0], np.int32)
    got = sampling.log_probabilities(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(got, expected[np.arange(5), tokens], rtol=1e-5)
    values, ids = sampling.top_log_probabilities(jnp.asarray(logits), 6)
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=1)[:, :6])
    np.testing.assert_allclose(values, -np.sort(-expected, axis=1)[:, :6], rtol=1e-5)
