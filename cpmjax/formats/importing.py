"""Checkpoints of others become a run: one model or a series, one file at a time, verified, resumable.

Each checkpoint is written slice by slice, read back and compared with what was read from the source; then a line about
it goes into provenance.json, and a checkpoint that has one is not imported again. What cannot be imported is named, and
the rest goes on.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.formats.history import Chronology
from cpmjax.formats.loading import Stored
from cpmjax.formats.sources import Candidate
from cpmjax.model.weights import checksum
from cpmjax.run import cli
from cpmjax.run.config import CheckpointConfig, Config
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import DiskFull, Unreachable, UserError
from cpmjax.run.identity import differences, encode


@dataclass(frozen=True)
class Failure:
    name: str
    reason: str


class _Misconfigured(UserError):
    """What is wrong with the import, whatever file comes first."""


def import_run(
    directory: RunDirectory, chronology: Chronology, arriving: Mapping[int, Candidate], say: Callable[[str], None]
) -> list[Failure]:
    """Makes a run of {step: model}, or goes on with one; returns those of several that could not be imported, and why.

    A new directory is gone again if it got no checkpoint. Raises UserError if the directory is something else, another
    import or another configuration, if a model that comes alone cannot be imported, and DiskFull or Unreachable.
    """
    failures: list[Failure] = []
    said: set[str] = set()  # of each file the same: said once
    with _alone_in(directory), contextlib.ExitStack() as stack:
        config = _resume(directory, chronology) if directory.exists else None
        total = 3 * sum(each.size for each in arriving.values())
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, disable=None))
        for step, each in arriving.items():
            began, before = time.perf_counter(), bar.n
            bar.set_description(f"step {step}")
            try:
                if config is not None and _is_done(directory, step, chronology.facts(config, step)):
                    say(f"step {step}: {each.name} is imported already")
                    continue
                with each.open(bar.update) as stored:
                    for note in stored.notes:
                        if note not in said:
                            say(note)
                    said |= set(stored.notes)
                    if config is None:
                        config = _create(directory, chronology, stored)
                    _import_one(directory, chronology, config, step, each, stored, bar)
                seconds = time.perf_counter() - began
                say(f"step {step}: {each.name}, {each.size / 1e9:.3g} GB, imported and verified in {seconds:.1f} s")
            except UserError as error:
                if isinstance(error, DiskFull | Unreachable | _Misconfigured) or len(arriving) == 1:
                    raise
                failures.append(Failure(each.name, str(error)))
                say(f"step {step}: NOT imported: {error}")
            finally:
                bar.update(before + 3 * each.size - bar.n)
    return failures


@contextlib.contextmanager
def _alone_in(directory: RunDirectory) -> Iterator[None]:
    """Keeps other processes from the directory; one that was not there before and got no checkpoint is removed."""
    is_new = not directory.path.exists()
    with directory.lock():
        try:
            yield
        finally:
            if is_new and not any(path.name.isdigit() for path in directory.checkpoints.glob("*")):
                shutil.rmtree(directory.path)


def _create(directory: RunDirectory, chronology: Chronology, stored: Stored) -> Config:
    try:
        config = chronology.configure(directory.path, stored.weights.config)
    except UserError as error:
        raise _Misconfigured(str(error)) from error
    if stored.tokenizer is not None:
        stored.tokenizer.save(directory.path)
    directory.create(config, {"kind": "import", "source": chronology.source, "checkpoints": {}})
    return config


def _resume(directory: RunDirectory, chronology: Chronology) -> Config:
    """The configuration of an import that was begun. Raises UserError if this is another one, or no import."""
    provenance = directory.provenance()
    if provenance["kind"] != "import" or provenance["source"] != chronology.source:
        what = f"an import of {provenance['source']}" if provenance["kind"] == "import" else "a run"
        raise UserError(f"{directory.path} holds {what} already; expected a new directory for {chronology.source}")
    model = cli.decode(directory.read_config(), str(directory.config_file)).model
    config = chronology.configure(directory.path, model)
    directory.check_resume(config)
    return config


def _is_done(directory: RunDirectory, step: int, facts: dict[str, Any]) -> bool:
    """Whether a checkpoint was written, with these facts, and verified: one without a line was complete before a kill,
    but not read."""
    line = directory.provenance()["checkpoints"].get(str(step), {})
    return facts.items() <= line.items() and (directory.checkpoints / str(step)).is_dir()


def _import_one(
    directory: RunDirectory,
    chronology: Chronology,
    config: Config,
    step: int,
    arriving: Candidate,
    stored: Stored,
    bar: Any,
) -> None:
    weights = stored.weights
    if weights.config != config.model:
        changed = differences(encode(config.model), encode(weights.config))
        listed = ", ".join(f"{key} {new}, not {old}" for key, (old, new) in changed.items())
        raise UserError(f"{arriving.name}: another model than the run's: {listed}; expected one model in a run")
    facts = chronology.facts(config, step)
    size = sum(math.prod(spec.shape) * weights.dtypes[path].itemsize for path, spec in weights.specs.items())
    share = arriving.size / size
    written: dict[tuple[str, int | None], int] = {}

    def read(path: str, layer: int | None) -> np.ndarray:
        array = np.ascontiguousarray(weights.read(path, layer))
        written[path, layer] = checksum(array)
        bar.update(array.nbytes * share)
        return array

    with contextlib.closing(Checkpoints(directory.checkpoints, CheckpointConfig())) as checkpoints:
        if step in checkpoints.steps():
            checkpoints.delete(step)
        checkpoints.save_weights(step, replace(weights, read=read), facts)
        try:
            saved = checkpoints.weights(step, config.model)
            for path, layer in weights.slices():
                array = saved.read(path, layer)
                if checksum(array) != written[path, layer]:
                    raise UserError(f"{arriving.name}: {path} reads back otherwise than it was written; deleted again")
                bar.update(array.nbytes * share)
        except UserError:
            checkpoints.delete(step)
            raise
    line = {"file": arriving.name, "dtype": weights.dtype_names(), **facts}
    provenance = directory.provenance()
    provenance["checkpoints"] |= {str(step): line}
    directory.write_provenance(provenance)
