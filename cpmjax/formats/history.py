"""A series of checkpoints as others publish it: one file or folder a step. First of all openbmb/MiniCPM-2B-history.

Its weights lie in the root as `pytorch_model.<step>`, an ordinary state dict each, beside one config and tokenizer.
What its schedule was is published in three places that disagree; `PUBLISHED` says what is taken, and what else is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmjax.model.presets import PRESETS
from cpmjax.run import cli
from cpmjax.run.config import Config, ModelConfig
from cpmjax.run.errors import UserError
from cpmjax.run.identity import encode
from cpmjax.run.table import aligned

_FILE = re.compile(r"(?:(?:pytorch_)?model|checkpoint|step|iter)?[._-]?(\d+)(?:\.(?:bin|pt|pth|safetensors))?")
_FOLDER = re.compile(r"(?:.*\D)?(\d+)")
_WEIGHTS = re.compile(r"(?:pytorch_model|model)(?:-\d+-of-\d+)?\.(?:bin|safetensors)(?:\.index\.json)?")

# What a series cannot say itself.
_TOLD_BY = ("schedule", "optimizer.learning_rate", "training.batch_size", "data.sequence_length")


@dataclass(frozen=True)
class Fact:
    """One number of the published run: the key that holds it here, who says so, and who says otherwise."""

    key: str
    value: int | float
    source: str
    others: str = ""


# The decay is let run on to step 300000: the card says that files after 280000 belong to its unused rest.
_WARMUP, _DECAY_AFTER, _LAST = 2_795, 261_000, 300_000
PUBLISHED = (
    Fact("training.batch_size", 960, "paper 6.2: 3.93 M tokens, about 960 rows"),
    Fact("data.sequence_length", 4096, "paper, Table 2"),
    Fact("optimizer.learning_rate", 0.01, "paper 6.2"),
    Fact("schedule.warmup", _WARMUP, "1 % of the steps in later code of the family", "the paper gives none"),
    Fact("schedule.stable", _DECAY_AFTER - _WARMUP, "model card: decay from 261000", "blog of 2024-02: from 263000"),
    Fact("schedule.decay", _LAST - _DECAY_AFTER, "model card: used until 279500, published further"),
    Fact("schedule.half_life", 5_000, "paper, eq. 1 read as a half-life", "blog of 2024-02: 8000"),
)


def is_published(model: ModelConfig) -> bool:
    """Whether a model has the shape of MiniCPM-2B, the one whose schedule is published."""
    return all(getattr(model, key) == value for key, value in PRESETS["minicpm-2b"].items() if key != "context")


def published_keys() -> dict[str, Any]:
    """The published run as sections and keys of a configuration."""
    tree: dict[str, Any] = {"schedule": {"type": "wsd", "shape": "half_life"}}
    for fact in PUBLISHED:
        section, _, key = fact.key.partition(".")
        tree.setdefault(section, {})[key] = fact.value
    return tree


@dataclass(frozen=True)
class Chronology:
    """What is known of when, in a training run, imported checkpoints were made: by keys of a command line, by what is
    published, or nothing."""

    source: str
    keys: tuple[str, ...]  # --section.key=value; they override what is published
    dated: bool  # whether the steps of the checkpoints are steps of training

    def configure(self, directory: Path, model: ModelConfig) -> Config:
        """The configuration of the run that they become. Raises UserError for keys that leave half of it open."""
        tree: dict[str, Any] = {"run": {"directory": str(directory)}, "model": encode(model)}
        published = self.dated and is_published(model)
        config = cli.override(tree | (published_keys() if published else {}), self.source, self.keys)
        missing = [f"--{key}" for key in _TOLD_BY if not any(given.startswith(f"--{key}") for given in self.keys)]
        if self.keys and missing and not published:
            raise UserError(f"{self.source}: {self.keys[0]} alone says too little; expected {', '.join(missing)} too")
        return config

    def facts(self, config: Config, step: int) -> dict[str, Any]:
        """step, tokens, stage and learning rate of a checkpoint; its stage is "imported" where nothing is known."""
        if not self._knows(config.model):
            return {"step": step, "tokens": None, "stage": "imported", "learning_rate": None}
        schedule = config.schedule.in_steps(config.batches)
        return {
            "step": step,
            "tokens": config.batches.tokens(step),
            "stage": schedule.stage(step),
            "learning_rate": config.optimizer.learning_rate * schedule.factor(step),
        }

    def describe(self, model: ModelConfig) -> list[str]:
        """Where the facts are from, with what the sources say against each other, in lines."""
        if self.dated and is_published(model):
            rows = [("key", "value", "source", "but")]
            rows += [(f"--{fact.key}", f"{fact.value:g}", fact.source, fact.others) for fact in PUBLISHED]
            return ["stage, tokens and learning rate are as published, where no key says otherwise:", aligned(rows)]
        if self.dated and not self.keys:
            asked = ", ".join(f"--{key}" for key in _TOLD_BY)
            return [f"stage, tokens and learning rate of the checkpoints are not known; {asked} would say them"]
        return []

    def _knows(self, model: ModelConfig) -> bool:
        return self.dated and (bool(self.keys) or is_published(model))


def find_steps(names: Iterable[str]) -> dict[int, str]:
    """{step: the file, or the folder, of its weights}, ascending; `names` are the files below a root, with "/".

    Files in the root are `pytorch_model.<step>`, with or without .bin and its like; a folder counts if its name ends
    in a number, it holds weights under their usual names, and the root has none of its own: where it has, a model was
    saved there with checkpoints of its making below. Raises UserError if two are of the same step.
    """
    names = sorted(names)
    is_model = any(_WEIGHTS.fullmatch(name) for name in names)
    found: dict[int, str] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        match = _FOLDER.fullmatch(folder) if folder and _WEIGHTS.fullmatch(file) and not is_model else None
        if not folder:
            match = _FILE.fullmatch(file)
        if match is None or "/" in folder:
            continue
        step, entry = int(match[1]), folder or file
        if found.setdefault(step, entry) != entry:
            raise UserError(f"{found[step]} and {entry} are both of step {step}; expected one file or folder a step")
    return dict(sorted(found.items()))
