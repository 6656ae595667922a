"""A path -> a model or a tokenizer, recognised by its content."""

from __future__ import annotations

from pathlib import Path

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.transformer import MiniCPM
from cpmjax.run import cli
from cpmjax.run.config import ComputeConfig
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError


def load(path: str | Path, step: int | None = None, compute: ComputeConfig | None = None) -> MiniCPM:
    """The model of a run directory, at its newest checkpoint or at `step`.

    `compute` says how it is computed (precision, unrolling); by default as in training. Raises UserError if the path
    is no run, or has no such checkpoint.
    """
    directory = RunDirectory(path)
    config = cli.decode(directory.read_config(), str(directory.config_file))
    checkpoints = Checkpoints(directory.checkpoints)
    if not checkpoints.steps():
        raise UserError(f"{directory.path} has no checkpoint yet: expected a complete one in {directory.checkpoints}")
    parameters = checkpoints.parameters(checkpoints.steps()[-1] if step is None else step)
    return MiniCPM(config.model, parameters, compute or config.compute)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory, or of a sentencepiece .model file."""
    return Tokenizer.load(path)
