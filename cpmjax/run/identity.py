"""What makes two runs the same run: a configuration as plain data, its fingerprint, what differs between two."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from typing import Any

import draccus

from cpmjax.run.config import Config


def encode(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, as YAML and JSON hold it."""
    return json.loads(json.dumps(draccus.encode(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


# Keys that say where a run and its text live, which steps to trace or what a resume may change; they are no part of
# what the run is.
_NOT_PART_OF_A_RUN = ("run.directory", "run.cache", "run.accept_changes", "data.folder", "log.profile_steps")
# A resume must look for checkpoints where they are; the experiment is the same one, wherever that is.
_NOT_PART_OF_AN_EXPERIMENT = "checkpoint.folder"
# Keys that are younger than some runs, with their defaults: there they are no part of the fingerprint, so that an older
# run keeps its own. A star is any name.
_YOUNGER: dict[str, Any] = {
    "compute.attention": "auto",
    "data.corpora.*.on_end": "repeat",
    "optimizer.type": "adamw",
    "optimizer.offload": False,
    "optimizer.state_dtype": "float32",
    "training.batch_warmup": [],
    "training.ema": None,
}


def comparable(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of an encoded configuration that make two runs the same run."""
    return {key: value for key, value in flatten(tree).items() if not key.startswith(_NOT_PART_OF_A_RUN)}


def fingerprint(config: Config) -> str:
    """12 hexadecimal digits; equal for equal experiments, wherever they run."""

    def as_before(key: str, value: Any) -> bool:
        if key == _NOT_PART_OF_AN_EXPERIMENT:
            return True
        return any(fnmatch.fnmatchcase(key, younger) and value == default for younger, default in _YOUNGER.items())

    keys = {key: value for key, value in comparable(encode(config)).items() if not as_before(key, value)}
    text = json.dumps(keys, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} between two encoded configurations; None where a side lacks the key."""
    before, after = comparable(old), comparable(new)
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}
