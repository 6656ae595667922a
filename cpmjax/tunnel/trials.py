"""The trials of a study: what to run, what is finished, and one tidy table.

    <directory>/trials.jsonl   a line for each trial that has ended: its labels, its status, its rows
    <directory>/trials.csv     the same as a table, one line a row

A trial is known by all that its results depend on: its experiment, its parametrisation, its text. The same study run
again, after a kill or with more values, does what is not there yet and nothing twice. A trial that diverges is a row
like any other; one that fails for another reason is a row as well, and is tried again the next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.mup import Parametrisation
from cpmjax.run.config import Config
from cpmjax.run.directory import Lines, only_writer
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.table import Row, write_csv

_SECONDS_BETWEEN_LINES = 10.0  # in a log that is no terminal
_OVERHEAD_FLOPS = 1e9  # what a step costs beside its FLOPs, on the machine of the committed results: 5 ms


class Diverged(Exception):
    """A trial whose numbers ceased to be finite; `rows` are its results until then."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Trial:
    """One training run of a study, from its beginning or from a state of another one."""

    labels: Row  # its columns in the table: what makes it different from the others
    config: Config  # its schedule is the whole one, from step 1, also where the trial is a branch
    table: Parametrisation
    trunk: Trial | None = None  # whose run it goes on with, weights, moments and place in the text,
    after: int = 0  # from its state after this many updates
    keep: tuple[int, ...] = ()  # after which of its own updates its state is kept for branches

    def identity(self, recipe: str) -> str:
        """12 hexadecimal digits that stand for everything its results depend on."""
        parts: tuple[Any, ...] = (fingerprint(self.config), repr(self.table), recipe)
        if self.trunk is not None:
            parts += (self.trunk.identity(recipe), self.after)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    @property
    def total(self) -> int:
        """The step at which it ends."""
        return self.config.schedule.in_steps(self.config.batches).total

    @property
    def cost(self) -> float:
        """Roughly, in FLOPs: what the estimate of the time left goes by. Of a branch, only its own updates."""
        batches = self.config.batches
        steps = self.total - self.after
        tokens = batches.tokens(self.total) - batches.tokens(self.after)
        per_token = training_flops_per_token(self.config.model, self.config.data.sequence_length)
        return per_token * tokens + steps * _OVERHEAD_FLOPS


class Trials:
    """The trials of one study in their directory."""

    def __init__(self, directory: str | Path, trials: Sequence[Trial], recipe: str) -> None:
        """`recipe` stands for what all trials depend on: their text, versions, and what is measured."""
        self.directory = Path(directory).expanduser()
        # Two of them may be the same run under other labels, as the smallest width is the smallest depth.
        self._trials = [(trial.identity(recipe), trial) for trial in trials]
        self._recipe, self._elsewhere = recipe, set[str]()
        self._ledger_file = self.directory / "trials.jsonl"
        self.table_file = self.directory / "trials.csv"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process from this study. Raises UserError if one holds it, or if it is a run."""
        if (self.directory / "config.yaml").exists():
            raise UserError(f"{self.directory} is a run; expected a directory of its own for a study")
        with only_writer(self.directory, "study"):
            yield

    def run(self, measure: Callable[[Trial], list[Row]]) -> None:
        """Measures what has not ended yet, in order, and writes the table. Call it inside `lock`.

        A UserError is the study's and ends it; any other error is the trial's, and the next one begins.
        """
        ended = {line["trial"] for line in self._ended()} | self._elsewhere
        waiting = {name: trial for name, trial in self._trials if name not in ended}
        ledger = Lines(self._ledger_file)
        try:
            with Progress(len(dict(self._trials)), list(waiting.values())) as progress:
                for name, trial in waiting.items():
                    progress.begin(trial)
                    ledger.append({"trial": name} | outcome_of(trial, measure))
                    progress.end(trial)
        finally:
            ledger.close()
            write_csv(self.table_file, self.rows())

    def record(self, outcomes: Iterable[tuple[Trial, dict[str, Any]]]) -> None:
        """Takes in what trials left that ended elsewhere, so that `run` leaves them alone, and writes the table.

        Call it inside `lock`.
        """
        known = {line["trial"]: line["status"] for line in self._lines()}
        ledger = Lines(self._ledger_file)
        try:
            for trial, outcome in outcomes:
                name = trial.identity(self._recipe)
                self._elsewhere.add(name)
                if known.get(name) != outcome["status"]:
                    ledger.append({"trial": name} | outcome | {"labels": trial.labels})
        finally:
            ledger.close()
            write_csv(self.table_file, self.rows())

    def rows(self) -> list[Row]:
        """The table: the labels of each trial, its status, and one line for each row of its results."""
        return [outcome | row for outcome, rows in self._results() for row in rows or [{}]]

    def outcomes(self) -> list[Row]:
        """One line for each trial that has ended: its labels, status, message and seconds."""
        return [outcome for outcome, _ in self._results()]

    def _results(self) -> list[tuple[Row, list[Row]]]:
        lines = {line["trial"]: line for line in self._lines()}
        ended = [(trial.labels, lines[name]) for name, trial in self._trials if name in lines]
        facts = ("status", "message", "seconds")
        return [(labels | {key: line[key] for key in facts}, line["rows"]) for labels, line in ended]

    def _lines(self) -> list[dict[str, Any]]:
        return Lines.read(self._ledger_file) if self._ledger_file.exists() else []

    def _ended(self) -> list[dict[str, Any]]:
        return [line for line in self._lines() if line["status"] != "failed"]


def outcome_of(trial: Trial, measure: Callable[[Trial], list[Row]]) -> dict[str, Any]:
    """What a trial leaves in the ledger, whatever became of it."""
    began = time.perf_counter()
    status, message = "finished", ""
    try:
        rows = measure(trial)
    except Diverged as error:
        status, message, rows = "diverged", str(error), error.rows
    except UserError:
        raise
    except Exception as error:  # whatever it is, the other trials go on
        status, message, rows = "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], []
    seconds = round(time.perf_counter() - began, 3)
    return {"labels": trial.labels, "status": status, "message": message, "seconds": seconds, "rows": rows}


class Progress:
    """How far a study is: a bar on a terminal, else a line from time to time; the time left goes by cost."""

    def __init__(self, count: int, waiting: Sequence[Trial]) -> None:
        """`waiting` are those of `count` trials that have not ended yet."""
        self._count, self._number = count, count - len(waiting)
        self._to_do, self._done = sum(trial.cost for trial in waiting), 0.0
        self._began = self._spoke = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._count, initial=self._number, unit="trial", bar_format=_BAR)
        elif self._number:
            print(f"{self._number} of {self._count} trials had ended before", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, trial: Trial) -> None:
        labels = " ".join(
            str(value) if isinstance(value, str) else f"{key} {value:g}"
            for key, value in trial.labels.items()
            if key != "axis"  # the key of its value says the same
        )
        if self._bar is not None:
            self._bar.set_postfix_str(f"{labels}, ETA {self.left()}")
        elif self._done == 0 or time.monotonic() - self._spoke > _SECONDS_BETWEEN_LINES:
            self._spoke = time.monotonic()
            print(f"trial {self._number + 1}/{self._count}: {labels}; ETA {self.left()}", file=sys.stderr, flush=True)

    def end(self, trial: Trial) -> None:
        self._done += trial.cost
        self._number += 1
        if self._bar is not None:
            self._bar.update()

    def left(self) -> str:
        """Minutes and seconds, "?" before the first trial has ended."""
        if not self._done:
            return "?"
        pace = (time.monotonic() - self._began) / self._done
        minutes, seconds = divmod(math.ceil(pace * (self._to_do - self._done)), 60)
        return f"{minutes}:{seconds:02d}"


_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
