"""Tables: aligned for a terminal, and as CSV with numbers that read back bit for bit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpmjax.run.directory import write_atomically
from cpmjax.run.errors import UserError

Row = dict[str, Any]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """One line a row, a column for every key that any row has; what a row lacks is an empty cell."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_csv(path: str | Path) -> list[Row]:
    """The rows of `write_csv`: whole numbers as int, other numbers as float, empty cells left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{key: _value(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such table; expected the CSV file of a study") from error


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell
