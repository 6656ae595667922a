from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmjax.data.batches import Batches, Rows, held_out_batches
from cpmjax.data.mixture import Mixture, Segment
from cpmjax.data.tokens import Split
from cpmjax.run.errors import UserError

DTYPES = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}


def split(lengths: list[int], name="books (train)") -> Split:
    """Documents of the given lengths whose tokens are all different."""
    return Split(name, np.arange(sum(lengths), dtype=np.uint16) + 100, np.cumsum([0, *lengths]))


def expected_row(lengths: list[int], start: int, length: int) -> dict[str, list]:
    """The definition, token by token."""
    document_of = [number for number, size in enumerate(lengths) for _ in range(size)]
    row: dict[str, list] = {key: [] for key in DTYPES}
    position = segment = 0
    for place in range(start, start + length):
        if place + 1 >= len(document_of):
            for values in row.values():
                values.append(0)
            continue
        begins = place == start or document_of[place] != document_of[place - 1]
        position = 0 if begins else position + 1
        segment += begins
        row["tokens"].append(place + 100)
        row["targets"].append(place + 101)
        row["positions"].append(position)
        row["segments"].append(segment)
        row["weights"].append(float(document_of[place] == document_of[place + 1]))
    return row


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=20)


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 50))
def test_held_out_rows_are_the_windows_in_order_and_the_last_is_padded(lengths, length):
    rows = Rows(split(lengths), length, seed=None)
    assert (rows.rows - 1) * length < sum(lengths) - 1 <= rows.rows * length
    for index in range(rows.rows):
        row = rows.row(index)
        assert {key: values.tolist() for key, values in row.items()} == expected_row(lengths, index * length, length)
        assert {key: values.dtype for key, values in row.items()} == DTYPES
    # Every token but the first of each document is predicted, once, except across the edge of a document.
    total = sum(rows.row(index)["weights"].sum() for index in range(rows.rows))
    assert total == sum(lengths) - len(lengths)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_each_epoch_reads_every_full_row_once(lengths, length, seed):
    count = (sum(lengths) - 1) // length
    if count == 0:
        with pytest.raises(UserError):
            Rows(split(lengths), length, seed)
        return
    rows = Rows(split(lengths), length, seed)
    assert rows.rows == count
    windows = {start * length + 100: expected_row(lengths, start * length, length) for start in range(count)}
    for epoch in range(2):
        read = [rows.row(index) for index in range(epoch * count, (epoch + 1) * count)]
        starts = [int(row["tokens"][0]) for row in read]
        assert sorted(starts) == sorted(windows)
        for start, row in zip(starts, read, strict=True):
            assert {key: values.tolist() for key, values in row.items()} == windows[start]


def test_epochs_and_seeds_shuffle_differently_and_reading_keeps_no_state():
    def order(rows: Rows, indices) -> list[int]:
        return [int(rows.row(index)["tokens"][0]) for index in indices]

    one, again, other = (Rows(split([10] * 500), 10, seed) for seed in (0, 0, 1))
    first, second = order(one, range(499)), order(one, range(499, 998))
    assert first != sorted(first)
    assert first != second
    assert first != order(other, range(499))
    assert order(again, reversed(range(998))) == list(reversed(first + second))
    assert order(again, [10**9]) == order(one, [10**9])


def test_a_batch_is_the_rows_of_its_positions():
    corpora = {name: Rows(split([30] * size), 8, seed=5) for name, size in (("a", 40), ("b", 7))}
    mixture = Mixture([Segment(60, {"a": 2.0, "b": 1.0}), Segment(None, {"b": 1.0})], seed=5)
    batches = Batches(mixture, corpora)
    batch = batches(50, 20)
    assert {key: (values.shape, values.dtype) for key, values in batch.items()} == {
        key: ((20, 8), dtype) for key, dtype in DTYPES.items()
    }
    for number, position in enumerate(range(50, 70)):
        corpus, index = mixture.locate(position)
        for key, values in corpora[corpus].row(index).items():
            assert np.array_equal(batch[key][number], values)


@pytest.mark.parametrize("limit", [1, 4, 5, 8, 100])
def test_held_out_batches_have_one_shape_and_the_first_rows(limit):
    rows = Rows(split([13] * 8), 10, seed=None)
    batches = list(held_out_batches(rows, limit, size=4))
    count = min(limit, rows.rows)
    assert len(batches) == -(-count // 4)
    for key, dtype in DTYPES.items():
        assert all(batch[key].shape == (4, 10) and batch[key].dtype == dtype for batch in batches)
        flat = list(itertools.chain(*(batch[key] for batch in batches)))
        assert all(np.array_equal(flat[index], rows.row(index)[key]) for index in range(count))
        assert not np.any(flat[count:])


@pytest.mark.parametrize(
    ("lengths", "seed", "counts"), [([5, 5], 0, "2 documents with 10 tokens"), ([], None, "0 doc")]
)
def test_too_little_text_is_refused_with_what_would_help(lengths, seed, counts):
    with pytest.raises(UserError, match=f"^corpus books .*: {counts}.*; expected .*data.(sequence_length|held_out)"):
        Rows(split(lengths), 10, seed)
