"""A checkpoint of a gigabyte: how long it stops training, how long it takes, and restores, beside a copy of its bytes.

    python experiments/benchmarks/checkpoints.py FOLDER [--rounds 3] [--layers 8]

The state is that of a training run: float32 parameters and the two moments of AdamW, 0.95 GB at 8 layers, all of them
drawn at random (fresh moments are zeros, which compress to nothing), laid over fsdp = 8 simulated devices. In a round,
one after another:

- copy: `cp` of a file of the same bytes, and fsync
- blocking: until `save` returns and the next step may begin
- save: until everything is in place and on the disk (fsync, as of the copy)
- restore: onto the mesh that it was written from
- restore onto another mesh: onto data 2 x fsdp 2 x tensor 2

Everything is read from the page cache. What is restored is compared, bit for bit, in the first round, outside the time.
One line of JSON a measurement; the bars are what orbax itself was measured to do (asynchronous, arrays of 1 GB).
About half a minute a round on 2 CPU cores; 3 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from measured import sample, say

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import CheckpointConfig, MeshConfig, ModelConfig
from cpmjax.run.optimizers import AdamW
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.state import TrainState, abstract_state

DEVICES = 8
_STEP = 1
_BLOCKING = 0.2  # seconds, at most
_SAVED, _RESTORED = 483, 736  # MB/s, at least


def config_of(layers: int) -> ModelConfig:
    return ModelConfig(vocabulary=32768, width=768, layers=layers, heads=12, feed_forward=1920)


def random_state(abstract: TrainState) -> TrainState:
    draw = np.random.default_rng(0)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        floats = np.issubdtype(like.dtype, np.floating)
        values = draw.standard_normal(like.shape, np.float32) if floats else np.zeros(like.shape)
        return jax.device_put(values.astype(like.dtype), like.sharding)

    return jax.block_until_ready(jax.tree.map(leaf, abstract))


def measure(folder: Path, config: ModelConfig, rounds: int) -> Iterator[dict[str, Any]]:
    """Samples of every round; the folder is made, and what was written there is deleted again."""
    optimizer = make_optimizer(config, AdamW())
    here = abstract_state(config, optimizer, make_mesh(MeshConfig(data=1, fsdp=DEVICES)))
    there = abstract_state(config, optimizer, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    state = random_state(here)
    leaves = jax.tree.leaves((state.trainable, state.optimizer))
    megabytes = sum(leaf.nbytes for leaf in leaves) / 1e6
    yield sample("state", "MB", megabytes)
    folder.mkdir(parents=True, exist_ok=True)
    source, copy, checkpoints = folder / "bytes", folder / "copy", folder / "checkpoints"
    with source.open("wb") as file:
        for leaf in leaves:
            file.write(np.asarray(leaf).tobytes())
        os.fsync(file.fileno())
    for number in range(rounds):
        began = time.perf_counter()
        subprocess.run(["cp", source, copy], check=True)
        _onto_the_disk(copy)
        copying = time.perf_counter() - began
        copy.unlink()
        yield sample("copy", "MB/s", megabytes / copying)

        with contextlib.closing(Checkpoints(checkpoints, CheckpointConfig())) as store:
            began = time.perf_counter()
            store.save(_STEP, state.trainable, state.optimizer, {"sequences": 0}, {"step": _STEP})
            blocking = time.perf_counter() - began
            store.wait()
            _onto_the_disk(checkpoints)
            saving = time.perf_counter() - began
        yield sample("blocking", "s", blocking, bar=_BLOCKING)
        yield sample("save", "MB/s", megabytes / saving, floor=_SAVED)
        yield sample("save, times as long as copy", "", saving / copying)

        for name, abstract in (("restore", here), ("restore onto another mesh", there)):
            with contextlib.closing(Checkpoints(checkpoints)) as store:
                began = time.perf_counter()
                found = _restored(store, abstract)
                restoring = time.perf_counter() - began
            yield sample(name, "MB/s", megabytes / restoring, floor=_RESTORED)
            yield sample(f"{name}, times as long as copy", "", restoring / copying)
            if number == 0 and any(
                np.asarray(a).tobytes() != np.asarray(b).tobytes()
                for a, b in zip(jax.tree.leaves(found), leaves, strict=True)
            ):
                raise AssertionError(f"{name}: other values than were saved")
            del found
        shutil.rmtree(checkpoints)
    source.unlink()


def _restored(store: Checkpoints, abstract: TrainState) -> tuple[Any, optax.OptState]:
    found = store.parameters(_STEP, abstract.trainable), store.optimizer(_STEP, abstract.optimizer)
    return jax.block_until_ready(found)


def _onto_the_disk(path: Path) -> None:
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def main(folder: Path, rounds: int, layers: int) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    for found in measure(folder, config_of(layers), rounds):
        say([found])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="of width 768; 81 MB each (default: %(default)s)")
    options = parser.parse_args()
    main(options.folder, options.rounds, options.layers)
