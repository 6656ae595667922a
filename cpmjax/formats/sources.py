"""Where weights come from: a folder or file here, or a repository of the hub, of which one model at a time is here."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from cpmjax.formats.history import find_steps
from cpmjax.formats.hub import HubRepository
from cpmjax.formats.loading import Reading, Stored, files_below, open_stored, recognise, run_steps, weight_files
from cpmjax.run.directory import RunDirectory, only_writer
from cpmjax.run.errors import UserError

# Config and tokenizer: the files beside the weights that say what they are.
_SHARED = re.compile(r"(?:[^/]+/)?[^/]+\.(?:json|jinja|model)")
_SMALL = 2**25  # bytes, at most, of such a file

OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Candidate:
    """A model of a source: its files are here, and open, as long as the block of `open` lasts."""

    name: str
    size: int  # bytes of its weights
    open: Callable[[OnBytes], contextlib.AbstractContextManager[Stored]]


@dataclass(frozen=True)
class Source:
    label: str  # in errors and in provenance.json: an absolute path, or a repository and its commit
    models: dict[int | None, Candidate]  # by step; None where there is one model without a step
    series: bool  # whether its models are the checkpoints of one run
    of_a_run: bool = False  # one of ours


@contextlib.contextmanager
def open_source(text: str, downloads: Path, reading: Reading = Reading()) -> Iterator[Source]:
    """The source that a command line names: a path, or hf://OWNER/REPO, whose files lie in `downloads` meanwhile.

    Raises UserError for a path that holds no model, and as `HubRepository`.
    """
    if text.startswith("hf://"):
        with _open_repository(text, downloads, reading) as source:
            yield source
        return
    path = Path(text).expanduser().absolute()  # provenance.json names it, wherever the next command is given
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected weights, or hf://OWNER/REPO")

    def candidate(name: str, files: Iterable[Path | epath.Path], step: int | None) -> Candidate:
        @contextlib.contextmanager
        def opened(on_bytes: OnBytes) -> Iterator[Stored]:
            on_bytes(size)
            yield open_stored(path, step, reading)

        size = sum(epath.Path(file).stat().length for file in files if file.exists())
        return Candidate(name, size, opened)

    kind = recognise(path)
    if kind == "run":
        folders = {step: RunDirectory(path).checkpoints / str(step) for step in run_steps(path)}
        models: dict[int | None, Candidate] = {
            step: candidate(f"step {step}", _files_in(folder), step) for step, folder in folders.items()
        }
        yield Source(str(path), models, series=True, of_a_run=True)
    elif path.is_dir():
        models = {
            step: candidate(names[0] if names else path.name, [path / name for name in names], step)
            for step, names in models_in(files_below(path)).items()
        }
        yield Source(str(path), models, series=None not in models)
    else:
        yield Source(str(path), {None: candidate(path.name, [path], None)}, series=False)


def _files_in(folder: Path | epath.Path) -> Iterator[Path | epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files_in(path)
        else:
            yield path


def absent(label: str, step: int) -> Candidate:
    """A model that is asked for and is not there: opening it raises UserError."""

    @contextlib.contextmanager
    def opened(on_bytes: OnBytes) -> Iterator[Stored]:
        raise UserError(f"{label}: holds no weights of step {step}; expected pytorch_model.{step} or its like")
        yield

    return Candidate(f"step {step}", 0, opened)


def models_in(names: Iterable[str]) -> dict[int | None, list[str]]:
    """{step: the files of its weights} of a folder or repository; the step is None where it holds one model."""
    names = list(names)
    steps = find_steps(names)
    if not steps:
        return {None: weight_files(names)}
    return {step: [at] if at in names else weight_files(names, f"{at}/") for step, at in steps.items()}


@contextlib.contextmanager
def _open_repository(url: str, downloads: Path, reading: Reading) -> Iterator[Source]:
    folder = downloads / "files"
    repository = HubRepository(url, folder)
    files = repository.files()

    def candidate(step: int | None, names: list[str]) -> Candidate:
        @contextlib.contextmanager
        def opened(on_bytes: OnBytes) -> Iterator[Stored]:
            with contextlib.ExitStack() as stack:
                for name in names:
                    stack.enter_context(repository.fetch(name, on_bytes))
                yield open_stored(folder, step, reading)

        return Candidate(names[0], sum(files[name].size for name in names), opened)

    found = models_in(files)
    if not all(found.values()):
        raise UserError(f"{url}: holds no weights; expected model.safetensors, pytorch_model.bin or their index")
    models = {step: candidate(step, names) for step, names in found.items()}
    weights = {name for names in found.values() for name in names}
    shared = [name for name in files.keys() - weights if _SHARED.fullmatch(name) and files[name].size <= _SMALL]
    with only_writer(downloads, "download"):
        try:
            with contextlib.ExitStack() as stack:
                for name in sorted(shared):
                    stack.enter_context(repository.fetch(name))
                yield Source(f"{url.partition('@')[0]}@{repository.commit}", models, series=None not in models)
        finally:
            _remove_empty(folder)
            if not folder.exists():
                shutil.rmtree(downloads)


def _remove_empty(folder: Path) -> None:
    """A download that was cut short stays, to be gone on from."""
    for path in sorted([folder, *folder.rglob("*")], reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
