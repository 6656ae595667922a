from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.data.mixture import BLOCK, Mixture, Segment
from cpmjax.run.errors import UserError

WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=1)
SEGMENTS = st.lists(st.builds(Segment, st.integers(0, 3000), WEIGHTS), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(SEGMENTS, st.integers(0, 2**31))
def test_every_index_of_a_corpus_comes_once_and_in_order(segments, seed):
    mixture = Mixture(segments, seed)
    seen: Counter[str] = Counter()
    for position in range(sum(segment.rows for segment in segments) + 100):
        assert position % 97 or mixture.counts(position) == {name: seen[name] for name in mixture.corpora}
        corpus, index = mixture.locate(position)
        assert index == seen[corpus]
        seen[corpus] += 1


@settings(max_examples=30, deadline=None)
@given(SEGMENTS, st.integers(0, 100), st.randoms())
def test_rows_do_not_depend_on_the_order_in_which_they_are_asked_for(segments, seed, random):
    positions = list(range(0, 60 * BLOCK, 509))
    forward = [Mixture(segments, seed).locate(position) for position in positions]
    shuffled = random.sample(range(len(positions)), len(positions))
    mixture = Mixture(segments, seed)
    located = {number: mixture.locate(positions[number]) for number in shuffled}
    assert [located[number] for number in range(len(positions))] == forward


@settings(deadline=None)
@given(WEIGHTS)
def test_each_block_has_the_weights_by_largest_remainder(weights):
    mixture = Mixture([Segment(None, weights)], seed=1)
    total = sum(map(Fraction, weights.values()))
    exact = {name: BLOCK * Fraction(weight) / total for name, weight in weights.items()}
    for block in (1, 7):
        before, after = mixture.counts(block * BLOCK), mixture.counts((block + 1) * BLOCK)
        rows = {name: after[name] - before[name] for name in weights}
        assert sum(rows.values()) == BLOCK
        assert all(abs(rows[name] - exact[name]) < 1 for name in weights)
        # Whoever was rounded up had no smaller a remainder than whoever was not.
        up = [exact[name] % 1 for name in weights if rows[name] > exact[name]]
        down = [exact[name] % 1 for name in weights if rows[name] < exact[name]]
        assert not up or not down or min(up) >= max(down) - Fraction(1, 10**9)


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, WEIGHTS, st.integers(0, 4000))
def test_a_branch_replays_its_trunk_and_goes_on_with_unseen_rows(stable, decay, boundary):
    trunk = Mixture([Segment(None, stable)], seed=3)
    branch = Mixture([Segment(boundary, stable), Segment(None, decay)], seed=3)
    for position in range(max(0, boundary - 300), boundary):
        assert branch.locate(position) == trunk.locate(position)
    consumed = trunk.counts(boundary)
    assert {name: rows for name, rows in branch.counts(boundary).items() if rows} == {
        name: rows for name, rows in consumed.items() if rows
    }
    for position in range(boundary, boundary + 300):
        corpus, index = branch.locate(position)
        assert corpus in decay
        assert index >= consumed.get(corpus, 0)


def test_blocks_are_ordered_differently_by_seed_segment_and_block():
    weights = {"a": 1.0, "b": 1.0}
    mixture = Mixture([Segment(BLOCK * 2, weights), Segment(None, weights)], seed=0)
    other = Mixture([Segment(None, weights)], seed=1)
    orders = [[mixture.locate(n * BLOCK + i)[0] for i in range(BLOCK)] for n in range(3)]
    orders.append([other.locate(i)[0] for i in range(BLOCK)])
    assert len({tuple(order) for order in orders}) == 4


def test_a_weight_that_would_never_give_a_row_is_refused():
    with pytest.raises(UserError, match=r"^corpus b: a weight of 0\.0001 .* expected at least"):
        Mixture([Segment(None, {"a": 1.0, "b": 0.0001})], seed=0)
