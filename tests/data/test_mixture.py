from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.data.mixture import BLOCK, Mixture, Segment, run_out
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


@settings(max_examples=40, deadline=None)
@given(SEGMENTS, st.dictionaries(st.sampled_from("abc"), st.integers(1, 2000)), st.integers(1, 6000))
def test_a_corpus_that_ends_leaves_its_share_to_the_others(segments, limits, end):
    segments = [*segments, Segment(None, segments[-1].weights | {"d": 1.0})]  # d never ends, but is not everywhere
    try:
        mixture = Mixture(run_out(segments, 0, limits, end), seed=0)
    except UserError as error:
        position = int(re.search(r"at row ([\d,]+) of", str(error))[1].replace(",", ""))
        assert position < end
        mixture = Mixture(run_out(segments, 0, limits, position), seed=0)
        here = next(s for s, stop in _stops(segments) if position < stop)
        assert {name for name in here.weights if mixture.counts(position)[name] < limits.get(name, 10**9)} == set()
        return
    seen: Counter[str] = Counter()
    for position in range(end):
        corpus, index = mixture.locate(position)
        assert index == seen[corpus] < limits.get(corpus, 10**9)
        seen[corpus] += 1
        here = next(s for s, stop in _stops(segments) if position < stop)
        assert corpus in here.weights
    # A run that is longer, or ends otherwise, has the same rows up to there.
    with contextlib.suppress(UserError):
        longer = Mixture(run_out(segments, 0, limits, 2 * end), seed=0)
        assert all(longer.locate(n) == mixture.locate(n) for n in range(max(0, end - 500), end))


def _stops(segments: list[Segment]) -> Iterator[tuple[Segment, float]]:
    stop = 0.0
    for segment in segments:
        stop += math.inf if segment.rows is None else segment.rows
        yield segment, stop


def test_what_is_left_keeps_its_weights_after_an_end():
    order = [Segment(None, {"a": 1.0, "b": 2.0, "c": 1.0})]
    mixture = Mixture(run_out(order, 5, {"a": 300}, 100 * BLOCK), seed=5)
    at_its_end = next(n for n in range(1, 5000) if mixture.counts(n)["a"] == 300)
    assert 4 * 300 - 50 < at_its_end < 4 * 300 + 50
    before, after = mixture.counts(at_its_end), mixture.counts(at_its_end + 30 * BLOCK)
    assert after["a"] == 300
    assert (after["b"] - before["b"]) / (after["c"] - before["c"]) == pytest.approx(2, rel=0.01)
    assert run_out(order, 5, {}, 10**12) == order
    with pytest.raises(
        UserError, match=r"^data\.corpora: at row 30 of 31 each of a, b has been read to its end; expected"
    ):
        run_out([Segment(None, {"a": 1.0, "b": 1.0})], 0, {"a": 10, "b": 20}, 31)
    assert Mixture(run_out([Segment(None, {"a": 1.0, "b": 1.0})], 0, {"a": 10, "b": 20}, 30), 0).counts(30) == {
        "a": 10,
        "b": 20,
    }


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
