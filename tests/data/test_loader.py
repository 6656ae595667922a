from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpmjax.data.loader import Loader

LENGTH, STRIDE = 6, 8


def batch_at(position: int, size: int) -> dict[str, np.ndarray]:
    """Every value says which row and column it is."""
    rows = 100 * np.arange(position, position + size)[:, None] + np.arange(LENGTH)
    return {"tokens": rows.astype(np.int32), "weights": (rows / 7).astype(np.float32)}


def wanted(position: int = 0, size: int = STRIDE, count: int = 8) -> list[tuple[int, int]]:
    return [(position + number * size, size) for number in range(count)]


def sharding(*spec, shape=(1, 1)) -> NamedSharding:
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    return NamedSharding(Mesh(devices, ("data", "sequence")), PartitionSpec(*spec))


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def check_rows(spec, shape) -> None:
    placed = sharding(*spec, shape=shape)
    for position in (0, 3 * STRIDE):
        with Loader(batch_at, wanted(position), placed) as loader:
            for step in range(4):
                batch = next(loader)
                for key, values in batch_at(position + step * STRIDE, STRIDE).items():
                    assert np.array_equal(batch[key], values)
                    assert batch[key].dtype == values.dtype
                    assert batch[key].sharding.is_equivalent_to(placed, 2)


def test_batches_follow_each_other_from_any_position():
    check_rows(("data", "sequence"), (1, 1))


def test_batches_may_change_their_size_and_end():
    with Loader(batch_at, [(0, 4), (4, 4), (8, 16)], sharding("data", "sequence")) as loader:
        made = list(loader)
    assert [len(batch["tokens"]) for batch in made] == [4, 4, 16]
    together = np.concatenate([batch["tokens"] for batch in made])
    assert np.array_equal(together, batch_at(0, 24)["tokens"])


def test_only_the_rows_of_each_shard_are_made_on_eight_devices():
    code = """
import sys, jax
sys.path.insert(0, sys.argv[1])
import test_loader as t
assert len(jax.devices()) == 8
for spec, shape in [(("data",), (8, 1)), (("data", "sequence"), (4, 2)), ((None, "sequence"), (1, 2)), ((), (2, 2))]:
    t.check_rows(spec, shape)
asked = []
def counted(position, size):
    asked.append((position, size))
    return t.batch_at(position, size)
with t.Loader(counted, t.wanted(), t.sharding("data", "sequence", shape=(4, 2))) as loader:
    next(loader)
assert sorted(asked)[:4] == [(0, 2), (2, 2), (4, 2), (6, 2)], asked
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_the_producer_raises_reaches_the_consumer_at_its_batch():
    def failing(position: int, size: int) -> dict[str, np.ndarray]:
        if position >= 2 * STRIDE:
            raise ValueError(f"row {position} is lost")
        return batch_at(position, size)

    with Loader(failing, wanted(), sharding("data")) as loader:
        next(loader)
        next(loader)
        with pytest.raises(ValueError, match="row 16 is lost"):
            next(loader)


def test_waiting_is_measured_and_work_is_done_ahead():
    def slow(position: int, size: int) -> dict[str, np.ndarray]:
        time.sleep(0.2)
        return batch_at(position, size)

    with Loader(slow, wanted(), sharding("data")) as loader:
        next(loader)
        assert 0.1 < loader.waited < 5
        time.sleep(1.5)
        before = loader.waited
        next(loader)
        assert loader.waited - before < 0.1


def test_closing_leaves_no_thread_behind():
    assert not loader_threads()
    with Loader(batch_at, wanted(), sharding("data")) as loader:
        next(loader)
        assert loader_threads()
    assert not loader_threads()
