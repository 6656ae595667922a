"""Tables: aligned text, and CSV that reads back as it was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmjax.run.errors import UserError
from cpmjax.run.table import aligned, read_csv, write_csv

NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False)


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([("a", "long head"), ("wide cell", "b")]) == "a          long head\nwide cell  b"


@given(rows=st.lists(st.dictionaries(st.sampled_from(["width", "loss", "step"]), NUMBERS, min_size=1), min_size=1))
def test_numbers_read_back_bit_for_bit(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    write_csv(path, rows)
    read = read_csv(path)
    assert read == rows
    assert [{key: type(value) for key, value in row.items()} for row in read] == [
        {key: type(value) for key, value in row.items()} for row in rows
    ]


def test_text_not_finite_numbers_and_what_is_missing(tmp_path):
    path = tmp_path / "table.csv"
    write_csv(path, [{"name": 'with, comma and "quotes"', "loss": math.inf}, {"loss": math.nan, "step": 1}])
    first, second = read_csv(path)
    assert first == {"name": 'with, comma and "quotes"', "loss": math.inf}
    assert second["step"] == 1 and math.isnan(second["loss"]) and "name" not in second
    assert path.read_text().splitlines()[0] == "name,loss,step"


def test_no_rows_and_no_table(tmp_path):
    write_csv(tmp_path / "empty.csv", [])
    assert read_csv(tmp_path / "empty.csv") == []
    with pytest.raises(UserError, match=r"missing\.csv: there is no such table"):
        read_csv(tmp_path / "missing.csv")
