"""Series to study without training: checkpoints that walk at random, those of a trunk and of its branches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.checkpoint.series import Series
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.model.parameters import Tree, flat, specs
from cpmjax.model.weights import Weights
from cpmjax.run.config import CheckpointConfig, Config, ModelConfig, RunConfig
from cpmjax.run.directory import RunDirectory
from cpmjax.run.identity import fingerprint
from cpmjax.run.schedule import WSD

MODEL = ModelConfig(vocabulary=48, width=16, layers=3, heads=2, feed_forward=24, dim_model_base=16)


def tree(seed: int, model: ModelConfig = MODEL, scale: float = 0.3) -> Tree:
    """Random parameters in float32; gains of norms around 1."""
    draw = np.random.default_rng(seed)

    def leaf(spec: Any) -> jax.Array:
        return jnp.asarray((spec.role == "norm") + scale * draw.standard_normal(spec.shape), jnp.float32)

    return jax.tree.map(leaf, specs(model))


def batch(rows: int = 6, length: int = 12, model: ModelConfig = MODEL) -> dict[str, np.ndarray]:
    """Random tokens, one document a row; the first rows count fewer tokens than the others."""
    draw = np.random.default_rng(0)
    shape = (rows, length)
    return {
        "tokens": draw.integers(0, model.vocabulary, shape, np.int32),
        "targets": draw.integers(0, model.vocabulary, shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
        "weights": (np.arange(length) >= np.arange(rows)[:, None]).astype(np.float32),
    }


def write(
    folder: Path,
    steps: Sequence[int],
    seed: int = 0,
    parent: Series | None = None,
    at: int = 0,
    dtype: Any = jnp.float32,
) -> Series:
    """A run whose checkpoints walk on at random from the parent's at step `at`, or from anywhere."""
    end = steps[-1]
    schedule = (
        WSD(warmup=1, stable=end - 1, decay=1) if parent is None else WSD(warmup=1, stable=at - 1, decay=end - at)
    )
    config = Config(run=RunConfig(directory=str(folder)), model=MODEL, schedule=schedule)
    provenance: dict[str, Any] = {"kind": "trained"}
    if parent is not None:
        facts = {"run": str(parent.path), "step": at, "fingerprint": fingerprint(parent.config)}
        provenance = {"kind": "branch", "parent": facts | {"position": 0, "moments": "fresh", "rewarmup": 0}}
    run = RunDirectory(folder)
    run.create(config, provenance)
    place = tree(seed) if parent is None else parent.parameters(at)
    with contextlib.closing(Checkpoints(run.checkpoints, CheckpointConfig())) as store:
        for step in steps:
            place = jax.tree.map(lambda x, d: (x + 0.1 * d).astype(dtype), place, tree(seed + step))
            facts = {"step": step, "tokens": 8 * step, "stage": schedule.stage(step), "learning_rate": 0.01}
            store.save(step, place, {"count": np.zeros(())}, {"sequences": step, "skipped": 0}, facts)
            store.wait()
    return Series(folder)


def as_weights(parameters: Tree, model: ModelConfig = MODEL) -> Weights:
    arrays = {path: np.asarray(leaf) for path, leaf in flat(parameters).items()}
    dtypes = {path: array.dtype for path, array in arrays.items()}
    return Weights(model, dtypes, lambda path, layer: arrays[path] if layer is None else arrays[path][layer])


def vector(parameters: Tree) -> np.ndarray:
    """All numbers in a row, float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(parameters)])
