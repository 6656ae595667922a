"""Results of a study that takes hours: noted one by one as they come, so that after a kill the same study goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpmjax.checkpoint.series import Series
from cpmjax.run.directory import Lines, RunDirectory, only_writer
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint


class Ledger(dict[str, Any]):
    """{name of a piece: its result}; what is assigned is a line of the file before it is here."""

    def __init__(self, lines: Lines, known: dict[str, Any]) -> None:
        super().__init__(known)
        self._lines = lines

    def __setitem__(self, name: str, result: Any) -> None:
        self._lines.append({"piece": name, "result": result})
        super().__setitem__(name, result)


@contextlib.contextmanager
def opened_ledger(directory: Path, study: str, series: Series, **settings: Any) -> Iterator[Ledger]:
    """DIRECTORY/ledger.jsonl, with what is known already of this study of this series with these settings.

    Results are what JSON holds. Raises UserError if it is of another one, and if another process writes it.
    """
    made = {
        "study": study,
        "fingerprint": fingerprint(series.config),
        "created": RunDirectory(series.path).provenance()["created"],
        **settings,
    }
    with only_writer(directory, study):
        lines = Lines(directory / "ledger.jsonl")
        try:
            head, *rest = Lines.read(lines.path) or [{"of": None}]
            if head["of"] is None:
                lines.append({"of": made})
            elif head["of"] != made:
                raise UserError(
                    f"{lines.path}: is of another series, or was asked otherwise; expected one of {series.path} with "
                    "the same settings, or another directory"
                )
            yield Ledger(lines, {line["piece"]: line["result"] for line in rest})
        finally:
            lines.close()
