"""A path -> a model, a tokenizer: a run, a Hugging Face folder, a GGUF file, told apart by what they hold."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.data.tokenizer import TextStart, Tokenizer
from cpmjax.formats import gguf_model, tokenizer_files
from cpmjax.formats.config_files import read_config
from cpmjax.formats.fold import Constants, unfold
from cpmjax.formats.gguf_files import open_gguf
from cpmjax.formats.history import find_steps
from cpmjax.formats.named_tensors import weights_of
from cpmjax.formats.safetensors_files import open_safetensors
from cpmjax.formats.shards import open_sharded
from cpmjax.formats.tensors import Tensors, map_file
from cpmjax.formats.torch_files import open_torch
from cpmjax.model.transformer import MiniCPM
from cpmjax.model.weights import Weights, cast
from cpmjax.run import cli
from cpmjax.run.config import ComputeConfig, Config
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError

Kind = Literal["run", "huggingface", "history", "gguf", "safetensors", "torch"]
_SHARD = re.compile(r"(?:pytorch_model|model)-\d+-of-\d+\.(?:bin|safetensors)")


@dataclass(frozen=True)
class Stored:
    """A model at rest, what goes with it, and what there is to say about how it was read."""

    weights: Weights
    tokenizer: Tokenizer | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """What is to be done with weights as they are read, and what their files do not say."""

    constants: Constants | None = None  # a MiniCPM whose config lacks them gets them, a Llama is unfolded by them
    text_start: TextStart | None = None  # of a released tokenizer; None: as AutoTokenizer
    dtype: np.dtype | None = None  # None: as they come
    average: bool = False  # that of a run's parameters in their place

    def of(self, weights: Weights) -> Weights:
        if self.constants is not None and weights.config.parametrisation == "standard":
            return unfold(weights, self.constants, self.dtype)
        return cast(weights, self.dtype)


def recognise(path: Path) -> Kind:
    """What a file or folder is, by its content. Raises UserError if it is nothing of ours or theirs."""
    if path.is_dir():
        if RunDirectory(path).exists:
            return "run"
        if find_steps(files_below(path)):
            return "history"
        if (path / "config.json").exists():
            return "huggingface"
        raise UserError(
            f"{path}: no config.yaml, config.json or pytorch_model.<step> in it; "
            "expected a run directory, a Hugging Face folder or a folder of checkpoints"
        )
    head = map_file(path, "weights")[:9].tobytes()
    if head[:4] == b"GGUF":
        return "gguf"
    # Before torch: eight bytes of length come first, and may look like the beginning of a pickle or a zip file.
    if head[8:9] == b"{":
        return "safetensors"
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "torch"
    raise UserError(f"{path}: begins with {head[:8]!r}; expected weights: safetensors, torch.save or GGUF")


def files_below(root: Path) -> list[str]:
    """Names, relative to a folder, of its files and of those of its folders; a link that leads nowhere is one too."""
    return [path.relative_to(root).as_posix() for path in [*root.glob("*"), *root.glob("*/*")] if not path.is_dir()]


def open_stored(path: Path, step: int | None = None, reading: Reading = Reading()) -> Stored:
    """The model at a path, opened and checked, nothing of it read yet.

    `step` chooses a checkpoint of a run or of a series. Raises UserError, naming the file and what was expected, for
    anything that is no whole model.
    """
    kind = recognise(path)
    if reading.average and kind != "run":
        raise UserError(f"{path}: holds no run; expected one to load the average of its parameters from")
    if step is not None and kind not in ("run", "history"):
        raise UserError(f"{path}: holds one model, without steps; expected no step, got {step}")
    if kind == "run":
        stored = _open_run(RunDirectory(path), step, reading)
    elif kind == "gguf":
        stored = _open_gguf(path, reading)
    elif kind == "history":
        stored = _open_huggingface(path, _entry(path, step), reading)
    else:
        stored = _open_huggingface(path if kind == "huggingface" else path.parent, path, reading)
    rows, tokenizer = stored.weights.config.vocabulary, stored.tokenizer
    if tokenizer is not None and tokenizer.vocabulary > rows:
        # Not left to the lookup: it finds a row for every token, and says nothing where there is none.
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocabulary} tokens; expected at most the {rows} rows")
    return stored


def _open_huggingface(root: Path, weights: Path, reading: Reading) -> Stored:
    """The weights of a file or a folder, with its own config and tokenizer or else those of `root`."""
    home = weights if (weights / "config.json").exists() else root
    config, notes = read_config(home / "config.json", reading.constants)
    stored = reading.of(weights_of(open_tensors(weights), config, "huggingface"))
    tokenizer = _tokenizer_of(weights, reading.text_start) or _tokenizer_of(root, reading.text_start)
    return Stored(stored, tokenizer, notes)


def weight_files(names: Iterable[str], folder: str = "") -> list[str]:
    """Which of the files of a Hugging Face folder are its weights, those that transformers would take; may be none."""
    own = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in own:
            return [folder + single]
        index, suffix = f"{single}.index.json", single.rpartition(".")[2]
        if index in own:
            shards = sorted(name for name in own if _SHARD.fullmatch(name) and name.endswith(suffix))
            return [folder + name for name in [index, *shards]]
    return []


def open_tensors(path: Path) -> Tensors:
    """The tensors of a file of weights, or of those of a folder."""
    if path.is_dir():
        return _tensors_in(path)
    openers: dict[Kind, Callable[[Path], Tensors]] = {
        "gguf": open_gguf,
        "safetensors": open_safetensors,
        "torch": open_torch,
    }
    return openers[recognise(path)](path)


def load(
    path: str | Path, step: int | None = None, compute: ComputeConfig | None = None, average: bool = False
) -> MiniCPM:
    """The model of a run directory (its newest checkpoint, or that of `step`), a Hugging Face folder or a GGUF file.

    Parameters keep the type in which they are stored; what is quantised becomes float32. `compute` says how the model
    is computed (precision, unrolling); by default as in training, with what attention suits this machine. With
    `average` it is the average of a run's parameters, where the run kept one (`training.ema`, schedule-free AdamW).
    Warns of a GGUF file without muP scales, which gets those of the release. Raises UserError, naming the file and
    what was expected, for anything that is no whole model.
    """
    path = Path(path).expanduser()
    kind = recognise(path)
    if kind == "run":
        config, checkpoints, step = _checkpoint(RunDirectory(path), step)
        parameters = checkpoints.parameters(step, item="average" if average else "parameters")
        return MiniCPM(config.model, parameters, compute or replace(config.compute, attention="auto"))
    stored = open_stored(path, step, Reading(average=average))
    for note in stored.notes if kind == "gguf" else ():  # those of a config.json say what is usual
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return MiniCPM(stored.weights.config, stored.weights.tree(), compute or ComputeConfig())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory, of a Hugging Face folder, of a GGUF file, or a sentencepiece .model file.

    A released one starts text as `AutoTokenizer` does, with a space in front (`text_start="prefix_space"`); a bare
    .model file, as sentencepiece does.
    """
    path = Path(path).expanduser()
    if path.is_dir() and not RunDirectory(path).exists and (path / "config.json").exists():
        return tokenizer_files.read_tokenizer(path)
    if path.is_file() and map_file(path, "a tokenizer")[:4].tobytes() == b"GGUF":
        tokenizer = gguf_model.read_tokenizer(open_gguf(path))
        if tokenizer is None:
            raise UserError(f"{path}: has no vocabulary (tokenizer.ggml.model); expected a file with one")
        return tokenizer
    return Tokenizer.load(path)


def run_steps(path: Path) -> list[int]:
    """Steps of the complete checkpoints of a run directory, ascending. Raises UserError if it has none."""
    directory = RunDirectory(path)
    steps = Checkpoints(directory.checkpoints).steps()
    if not steps:
        raise UserError(f"{directory.path} has no checkpoint yet: expected a complete one in {directory.checkpoints}")
    return steps


def _checkpoint(directory: RunDirectory, step: int | None) -> tuple[Config, Checkpoints, int]:
    config = cli.decode(directory.read_config(), str(directory.config_file))
    return config, Checkpoints(directory.checkpoints), run_steps(directory.path)[-1] if step is None else step


def _open_run(directory: RunDirectory, step: int | None, reading: Reading) -> Stored:
    config, checkpoints, step = _checkpoint(directory, step)
    tokenizer = Tokenizer.load(directory.tokenizer_file) if directory.tokenizer_file.exists() else None
    weights = checkpoints.weights(step, config.model, "average" if reading.average else "parameters")
    return Stored(reading.of(weights), tokenizer)


def _open_gguf(path: Path, reading: Reading) -> Stored:
    file = open_gguf(path)
    config, notes = gguf_model.read_config(file)
    weights = reading.of(weights_of(file, config, "gguf"))
    return Stored(weights, gguf_model.read_tokenizer(file, reading.text_start), notes)


def _entry(root: Path, step: int | None) -> Path:
    steps = find_steps(files_below(root))
    if step not in steps:
        raise UserError(f"{root}: a series of checkpoints; expected a step, one of {', '.join(map(str, steps))}")
    return root / steps[step]


def _tensors_in(folder: Path) -> Tensors:
    names = weight_files(path.name for path in folder.iterdir())
    if not names:
        raise UserError(f"{folder}: holds no weights; expected model.safetensors, pytorch_model.bin or their index")
    first = folder / names[0]
    return open_tensors(first) if len(names) == 1 and first.suffix != ".json" else open_sharded(first)


def _tokenizer_of(root: Path, text_start: TextStart | None) -> Tokenizer | None:
    if not (root / "tokenizer.model").exists() and not (root / "tokenizer.json").exists():
        return None
    return tokenizer_files.read_tokenizer(root, text_start)
