"""Series that nobody trained: a run directory whose checkpoints hold parameters that a test makes up."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from cpmjax.checkpoint.series import Series
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.model.parameters import Tree, flat, specs
from cpmjax.model.weights import Weights
from cpmjax.run import cli
from cpmjax.run.config import CheckpointConfig, ModelConfig
from cpmjax.run.directory import RunDirectory

MODEL = {"vocabulary": 40, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "feed_forward": 24}
SCHEDULE = {"type": "wsd", "warmup": 10, "stable": 30, "decay": 20}


def parameters(seed: int, model: Mapping[str, object] = MODEL) -> Tree:
    """Normally distributed, float32."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda spec: draw.standard_normal(spec.shape, np.float32), specs(ModelConfig(**model)))


def in_memory(tree: Tree, model: Mapping[str, object] = MODEL) -> Weights:
    """Weights that are read out of a tree; an array keeps its type."""
    leaves = flat(tree)

    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(leaves[path] if layer is None else leaves[path][layer])

    return Weights(ModelConfig(**model), {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}, read)


def write_series(folder: Path, trees: Mapping[int, Tree], known: bool = True) -> Series:
    """A run with these parameters at these steps; `known=False`: like an import whose schedule nobody knows."""
    config = cli.decode({"model": MODEL, "schedule": SCHEDULE, "run": {"directory": str(folder)}}, "a test")
    run = RunDirectory(folder)
    run.create(config, {"kind": "import"})
    schedule = config.schedule
    with contextlib.closing(Checkpoints(run.checkpoints, CheckpointConfig())) as store:
        for step, tree in trees.items():
            facts = {"tokens": step * 100, "stage": schedule.stage(step), "learning_rate": schedule.factor(step) / 100}
            unknown = {"tokens": None, "stage": "imported", "learning_rate": None}
            store.save_weights(step, in_memory(tree), {"step": step, **(facts if known else unknown)})
    return Series(folder)
