"""The run directory: what its files are called, how a run begins, and lines that survive a kill.

Nothing in it is ever half written: a whole file is written beside its place and renamed into it, and a line counts
once its newline is there. `config.yaml` is written last when a run is created: a folder without it is no run yet.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from cpmjax.run.cli import decode, dump, read_yaml
from cpmjax.run.config import Config
from cpmjax.run.errors import UserError
from cpmjax.run.identity import differences, encode

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "cpmjax")
_FIRST_WORDS = b"# fingerprint: "  # of every config.yaml, see dump

_ESCAPE = "cpmjax.json_escape"
codecs.register_error(_ESCAPE, lambda error: (json.dumps(error.object[error.start : error.end])[1:-1], error.end))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives an OSError the file it is about: a full disk shows at write and fsync, which do not know the name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Writes a file so that a kill leaves the old content or the new, never a part. Text is UTF-8."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with _named(path):
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Makes the folder if need be, and keeps every other process from writing it; a killed process holds nothing.

    Raises UserError, which calls the folder a `what`, if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is writing this {what}; expected to be alone") from error
        yield


def json_line(record: dict[str, Any], encoding: str = "utf-8") -> str:
    """A record as one line of JSON without its newline: text as it is, and a JSON escape in place of each character
    that the encoding has no bytes for (UTF-8: half of a surrogate pair)."""
    return json.dumps(record, ensure_ascii=False).encode(encoding, _ESCAPE).decode(encoding)


class Lines:
    """An append-only .jsonl file in UTF-8: one record a line.

    Opening it drops a last line that a kill cut short. Floats are written so that they read back bit for bit; NaN
    and infinities as the bare words NaN, Infinity and -Infinity, which Python's json reads (strict readers do not).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        with _named(self.path):
            self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by close()
            self._file.seek(0)
            whole = self._file.read().rfind(b"\n") + 1
            self._file.truncate(whole)

    def append(self, record: dict[str, Any]) -> None:
        """Writes one line and hands it to the operating system."""
        with _named(self.path):
            self._file.write(json_line(record).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Returns when all lines are on the disk: what is saved after that may count on them."""
        with _named(self.path):
            os.fsync(self._file.fileno())

    def keep_until(self, step: int) -> None:
        """Drops all records of later steps, before they are made again."""
        lines = self.path.read_bytes().split(b"\n")[:-1]
        kept = [line for line, record in zip(lines, self.read(self.path), strict=True) if record["step"] <= step]
        if len(kept) < len(lines):
            self.close()
            write_atomically(self.path, b"".join(line + b"\n" for line in kept))
            self._open()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: str | Path) -> list[dict[str, Any]]:
        """All whole records, without a last line that lacks its newline. Raises UserError for any other broken line."""
        with _named(Path(path)):
            *lines, _ = Path(path).read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
            records.append(record)
        return records


class RunDirectory:
    """A run on disk. Whoever writes it takes `lock` first, and then calls `create` or `check_resume`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.yaml"
        self.tokenizer_file = self.path / "tokenizer.model"
        self.tokenizer_settings_file = self.path / "tokenizer.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.provenance_file = self.path / "provenance.json"
        self.plots = self.path / "plots"
        self.profile = self.path / "profile"

    @property
    def checkpoints(self) -> Path | epath.Path:
        """The folder of its checkpoints: here, or, of a run with `checkpoint.folder`, wherever that says."""
        elsewhere = self.read_config().get("checkpoint", {}).get("folder") if self.exists else None
        return epath.Path(elsewhere) if elsewhere else self.path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether the run was created; before that, its tokenizer and provenance may lie there already."""
        return self.config_file.is_file()

    def refuse_foreign(self) -> None:
        """Raises UserError if something other than a run, or the beginning of one, is at this place."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a run directory: it is a file")
        if self.exists:
            if not self.config_file.read_bytes().startswith(_FIRST_WORDS):
                raise UserError(f"{self.path} is not a run directory: its config.yaml has no fingerprint")
        elif self.path.exists():
            before = {self.config_file, self.tokenizer_file, self.tokenizer_settings_file, self.provenance_file}
            foreign = [
                path.name
                for path in sorted(self.path.iterdir())
                if path.with_name(path.name.removesuffix(".partial")) not in before and not path.name.startswith(".")
            ]
            if foreign:
                raise UserError(f"{self.path} is not a run directory: it has {foreign[0]}, but no config.yaml")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process from writing this run; makes the folder if need be.

        Raises UserError if another process holds it, or as `refuse_foreign`. A killed process holds nothing.
        """
        self.refuse_foreign()
        with only_writer(self.path, "run"):
            yield

    def create(self, config: Config, provenance: dict[str, Any]) -> None:
        """Makes the folder a run. `provenance` says its kind and where from; time, versions, command, seed are added.

        Raises UserError as `refuse_foreign`, or if the run is there already.
        """
        self.refuse_foreign()
        if self.exists:
            raise UserError(f"{self.path} holds a run already; expected a new directory")
        self.path.mkdir(parents=True, exist_ok=True)
        circumstances = {
            "created": now(),
            "versions": versions(),
            "command": shlex.join(sys.orig_argv),
            "seed": config.run.seed,
        }
        self.write_provenance(provenance | circumstances)
        write_atomically(self.config_file, dump(config))

    def check_resume(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Compares the stored configuration with the one to go on with: {key: (old, new)} of what may change.

        A key that is younger than the run has its default there. What `run.accept_changes` covers is stored and noted
        in provenance.json. Raises UserError for anything else.
        """
        changed = differences(encode(decode(self.read_config(), str(self.config_file))), encode(config))
        accepted = config.run.accept_changes
        # Codes of 8 bits are no numbers to go on with in another type.
        eight_bits = "int8" in changed.get("optimizer.state_dtype", ())
        for key in ("optimizer.type", "optimizer.state_dtype"):
            if key in changed and (key == "optimizer.type" or eight_bits):
                old, new = changed[key]
                raise UserError(
                    f"{self.path} was made with {key}={old}; expected the same: its moments are nothing to {new}, "
                    f"a branch (--branch.run={self.path}) would begin with new ones"
                )
        refused = [key for key in changed if not any(f"{key}.".startswith(f"{name}.") for name in accepted)]
        if refused:
            listed = ", ".join(f"{key}: {_text(changed[key][0])} -> {_text(changed[key][1])}" for key in refused)
            accept = ",".join([*accepted, *refused])
            raise UserError(
                f"{self.path} was made with another configuration: {listed}; "
                f"expected the same, or --run.accept_changes=[{accept}] if that is meant"
            )
        if changed:
            provenance = self.provenance()
            change = {key: list(values) for key, values in changed.items()}
            # The same change twice in a row is one whose config.yaml a kill prevented.
            if [entry["keys"] for entry in provenance.get("changes", [])][-1:] != [change]:
                if any(key.startswith("data.") for key in changed):
                    provenance.pop("stores", None)  # what it began with may be other text
                provenance["changes"] = [*provenance.get("changes", []), {"time": now(), "keys": change}]
                self.write_provenance(provenance)
            write_atomically(self.config_file, dump(config))
        return changed

    def read_config(self) -> dict[str, Any]:
        """The tree in config.yaml; `cpmjax.run.cli.decode` makes a Config of it."""
        if not self.exists:
            raise UserError(f"{self.path} is not a run directory: there is no {self.config_file}")
        return read_yaml(self.config_file)

    def provenance(self) -> dict[str, Any]:
        try:
            return json.loads(self.provenance_file.read_bytes())
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.provenance_file}: expected a JSON object, as written when a run begins") from error

    def write_provenance(self, provenance: dict[str, Any]) -> None:
        write_atomically(self.provenance_file, json.dumps(provenance, indent=2) + "\n")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(*more: str) -> dict[str, str | None]:
    """Of Python, of the packages that a result depends on, and of more packages; None where one is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in (*_PACKAGES, *more)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
