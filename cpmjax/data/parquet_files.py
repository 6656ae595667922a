"""Parquet files: a document a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpmjax.data.documents import Bad, Document, from_bytes, missing
from cpmjax.data.files import matching, reading
from cpmjax.data.optional import optional

PARQUET = ("*.parquet",)

_ROWS = 1024  # turned into Python's bytes at one time


def parquet_files(path: str, field: str) -> Iterator[Document | Bad]:
    """Each row, named FILE:ROW (the first is 1). One row group is in memory at a time; rows before damage are there."""
    arrow, parquet = optional("pyarrow", path), optional("pyarrow.parquet", path)
    for file in matching(path, PARQUET):
        row = 0
        try:
            with reading(file) as stream:
                table = parquet.ParquetFile(stream)
                problem = _problem(arrow, table.schema_arrow, file.place, field)
                if problem is None and table.metadata.num_rows == 0:
                    problem = Bad("empty", f"{file.place}: empty; expected text")
                if problem is not None:
                    yield problem
                    continue
                for group in range(table.num_row_groups):
                    for batch in table.iter_batches(_ROWS, [group], [field]):
                        for raw in _values(arrow, batch.column(0)):
                            row += 1
                            name, place = f"{file.name}:{row}", f"{file.place}, row {row}"
                            yield _null(place, field) if raw is None else from_bytes(name, raw, place)
        except (OSError, arrow.ArrowException) as error:
            place = f"{file.place}, row {row + 1}" if row else file.place
            said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            yield Bad("damaged parquet", f"{place}: {said}; expected a readable, complete parquet file")


def _problem(arrow: Any, schema: Any, place: str, field: str) -> Bad | None:
    """Why a whole file has no document."""
    if field not in schema.names:
        return missing(place, field, schema.names)
    kind = schema.field(field).type
    values = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not any(getattr(arrow.types, f"is_{name}")(values) for name in _TEXT):
        return Bad("field not a string", f"{place}: its {field!r} is a column of {kind}; expected one of strings")
    return None


# Bytes are what some writers make of strings; they are decoded like any file.
_TEXT = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _values(arrow: Any, column: Any) -> list[bytes | None]:
    """As bytes: nobody has checked that what a file calls a string is UTF-8."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(arrow.large_binary()).to_pylist()


def _null(place: str, field: str) -> Bad:
    return Bad("field not a string", f"{place}: its {field!r} is null; expected a string")
