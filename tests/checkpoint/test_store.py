"""Checkpoints: bit for bit, on any number of devices, complete or absent, and readable errors for damaged ones."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from disks import Disk, small_disk
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cpmjax.checkpoint import failures
from cpmjax.checkpoint.store import Checkpoints
from cpmjax.run.config import CheckpointConfig
from cpmjax.run.errors import UserError

ADAM = optax.adam(1.0)
METADATA = {"step": 7, "tokens": 1234, "stage": "stable", "learning_rate": 0.1 + 0.2}
POSITION = {"sequences": 2**40 + 1, "skipped": 3}


def values(seed: int, rows: int = 64) -> dict[str, Any]:
    """Every finite bit pattern may occur, and the specials do."""
    random = np.random.default_rng(seed)
    matrix = random.integers(0, 2**32, (rows, 64), np.uint32).view(np.float32)
    matrix[0, :4] = (np.inf, -0.0, 1e-45, np.nan)
    return {"embedding": matrix, "layers": {"gate": random.normal(size=(2, 8, 16)).astype(np.float32)}}


def one_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), tree)


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def adam_state(seed: int) -> Any:
    parameters = one_device(values(seed))
    return jax.tree.map(lambda x: x + 1, ADAM.init(parameters))


def save(store: Checkpoints, step: int, seed: int | None = None) -> None:
    """Values of a step are drawn from its number."""
    seed = step if seed is None else seed
    store.save(step, one_device(values(seed)), adam_state(seed), POSITION, METADATA | {"step": step})


def assert_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoints 3 and 7 of a run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        for step in (3, 7):
            save(store, step)
    return folder


@pytest.mark.smoke
def test_what_is_restored_is_what_was_saved(saved):
    with contextlib.closing(Checkpoints(saved)) as store:
        assert store.steps() == [3, 7]
        assert store.newest() == str(saved / "7")
        for step in (3, 7):
            assert_bits(store.parameters(step), values(step))
            assert_bits(store.parameters(step, abstract(one_device(values(step)))), values(step))
            state = adam_state(step)
            restored = store.optimizer(step, abstract(state))
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            assert_bits(restored, state)
            assert store.has_optimizer(step)
            assert store.position(step) == POSITION
            assert store.metadata(step) == METADATA | {"step": step}


def test_the_state_of_another_step_may_change_while_it_is_written(tmp_path):
    """Saving is asynchronous: what the next step does to the arrays must not reach the checkpoint."""
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x + 5, tree), donate_argnums=0)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", CheckpointConfig())) as store:
        parameters = one_device(values(1, rows=4096))
        store.save(1, parameters, parameters, POSITION, METADATA)
        jax.block_until_ready(overwrite(parameters))
        store.wait()
        assert_bits(store.parameters(1), values(1, rows=4096))


def test_a_checkpoint_without_optimizer_and_position(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    for item in ("optimizer", "position"):
        shutil.rmtree(folder / "7" / item)
    with contextlib.closing(Checkpoints(folder)) as store:
        assert not store.has_optimizer(7) and store.has_optimizer(3)
        assert store.optimizer(7, abstract(adam_state(7))) is None
        assert store.position(7) is None
        assert_bits(store.parameters(7), values(7))


@pytest.mark.parametrize(
    "rules, kept",
    [
        (CheckpointConfig(), [1, 2, 3, 4, 5, 6, 7]),
        (CheckpointConfig(keep_last=2), [6, 7]),
        (CheckpointConfig(keep_last=1, keep_every=3), [3, 6, 7]),
        (CheckpointConfig(keep_last=1, steps=(2, 5)), [2, 5, 7]),
        (CheckpointConfig(keep_last=2, keep_every=4, steps=(1,)), [1, 4, 6, 7]),
    ],
)
def test_keep_rules(tmp_path, rules, kept):
    leaf = one_device({"x": np.arange(4, dtype=np.float32)})
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", rules)) as store:
        for step in range(1, 8):
            store.save(step, leaf, leaf, POSITION, METADATA)
        store.wait()
        assert store.steps() == kept
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept


def test_a_missing_checkpoint_is_one_error(saved, tmp_path):
    with contextlib.closing(Checkpoints(saved)) as store:
        for read in (store.parameters, store.position, store.metadata, store.has_optimizer):
            with pytest.raises(UserError, match=r"no checkpoint of step 5: expected one of 3, 7"):
                read(5)
    with pytest.raises(UserError, match="has no checkpoints: expected a folder"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut_short(parameters: Path) -> None:
    file = largest_file(parameters)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "the item is gone": shutil.rmtree,
    "a file of values is gone": lambda parameters: largest_file(parameters).unlink(),
    "a file of values is cut short": cut_short,
    "the index of the values is gone": lambda parameters: (parameters / "manifest.ocdbt").unlink(),
    "the metadata is no JSON": lambda parameters: (parameters / "_METADATA").write_text("{"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves its other reads behind
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_error_and_leaves_the_others_readable(saved, tmp_path, damage):
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    DAMAGES[damage](folder / "7" / "parameters")
    with contextlib.closing(Checkpoints(folder)) as store:
        for shape in (None, abstract(one_device(values(7)))):
            with pytest.raises(UserError, match=f"{folder}/7/parameters cannot be restored: .") as caught:
                store.parameters(7, shape)
            assert "\n" not in str(caught.value) and "TensorStore" not in str(caught.value)  # the reason, no specs
            assert len(str(caught.value)) < 1000
        with contextlib.suppress(UserError):  # some damage shows here as well; nothing else may come out
            store.metadata(7)
        assert_bits(store.parameters(3), values(3))
        assert store.metadata(3)["step"] == 3
    gc.collect()  # what is left behind is complained about here, not in another test


def test_parameters_of_another_shape_are_refused(saved):
    device = SingleDeviceSharding(jax.devices()[0])
    other = {
        "embedding": jax.ShapeDtypeStruct((32, 64), np.float32, sharding=device),
        "layers": {"gate": jax.ShapeDtypeStruct((2, 8, 16), np.float32, sharding=device)},
    }
    with contextlib.closing(Checkpoints(saved)) as store, pytest.raises(UserError, match=r"\(32, 64\).*\(64, 64\)"):
        store.parameters(7, other)


# In processes of their own: other numbers of devices, and a death in the middle of a save.


def run_here(function: str, *arguments: str | Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
    code = f"import sys, test_store; test_store.{function}(*sys.argv[1:])"
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, (*Path(__file__).parents[1:3], Path(__file__).parent))),
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def on_eight_devices(one: str, eight: str) -> None:
    """Restores what one device wrote, and writes from eight."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    spread = {"embedding": PartitionSpec("a", "b"), "layers": {"gate": PartitionSpec(None, "b", "a")}}

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, spread)

    wanted = abstract(place(values(7)))
    with contextlib.closing(Checkpoints(Path(one))) as store:
        found = store.parameters(7, wanted)
    assert_bits(found, values(7))
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == like.sharding and len(leaf.addressable_shards) == 8
        assert leaf.addressable_shards[0].data.size == leaf.size // 8
    with contextlib.closing(Checkpoints(Path(eight), CheckpointConfig())) as store:
        store.save(2, place(values(9)), {"mu": place(values(8))}, POSITION, METADATA)


def test_from_one_device_to_eight_and_from_eight_to_one(saved, tmp_path):
    eight = tmp_path / "checkpoints"
    done = run_here("on_eight_devices", saved, eight, devices=8)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(Checkpoints(eight)) as store:
        shapes = abstract(one_device(values(9)))
        for found in (store.parameters(2), store.parameters(2, shapes)):
            assert_bits(found, values(9))
            assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(found))
        assert_bits(store.optimizer(2, {"mu": shapes}), {"mu": values(8)})


ROWS_OF_A_LONG_SAVE = 2**15  # 8 MB


def save_and_die(folder: str, step: str, milliseconds: str) -> None:
    """Dies so many milliseconds after an asynchronous save began, with nothing tidied up."""
    parameters = one_device(values(int(step), ROWS_OF_A_LONG_SAVE))
    store = Checkpoints(Path(folder), CheckpointConfig())
    store.save(int(step), parameters, parameters, POSITION, METADATA)
    time.sleep(int(milliseconds) / 1000)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_death_during_a_save_leaves_a_complete_checkpoint_or_none(tmp_path):
    folder = tmp_path / "checkpoints"
    present = []
    for step, milliseconds in enumerate((0, 30, 100, 5000), 1):
        done = run_here("save_and_die", folder, str(step), str(milliseconds))
        assert done.returncode == -signal.SIGKILL, done.stderr
        with contextlib.closing(Checkpoints(folder)) as store:
            present.append(step in store.steps())
            for complete in store.steps():
                assert_bits(store.parameters(complete), values(complete, ROWS_OF_A_LONG_SAVE))
    assert not present[0] and present[-1]  # one death before the end of a save at least, and one after it
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())):
        pass  # whoever writes next tidies up
    assert all(path.name.isdigit() for path in folder.iterdir())


# A disk that fails, at any moment of a save.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of its own, of 64 MB."""
    with small_disk(tmp_path / "disk", "64m") as found:
        yield found


def replace_by_an_empty_one(folder: Path) -> None:
    """As a disk does that is no longer mounted: what is under its place shows."""
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


FAILURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "full": (lambda folder: Disk(folder.parent).resize("1m"), "no space left on the disk that holds {}: a "),
    "read-only": (
        lambda folder: Disk(folder.parent).remount("ro"),
        "{}: a checkpoint was not written: [Errno 30] Read-only",
    ),
    "gone": (lambda folder: folder.rename(folder.with_name("elsewhere")), "{}: a checkpoint was not written: the fold"),
    "replaced": (replace_by_an_empty_one, "{}: a checkpoint was not written: the folder is gone; expected the one "),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_disk_that_fails_is_one_error_and_leaves_what_is_complete(disk, failure):
    fail, beginning = FAILURES[failure]
    folder = disk.path / "checkpoints"
    store = Checkpoints(folder, CheckpointConfig())
    save(store, 3)
    store.wait()
    fail(folder)
    with pytest.raises(UserError) as caught:
        save_much(store, 7)
        store.wait()
    message = str(caught.value)
    assert message.startswith(beginning.format(folder)) and "\n" not in message
    assert message.endswith(f"; complete ones: {'3' if folder.exists() and (folder / '3').exists() else 'none'}")
    with contextlib.suppress(UserError):
        store.close()
    if (elsewhere := folder.with_name("elsewhere")).exists():
        shutil.rmtree(folder, ignore_errors=True)
        elsewhere.rename(folder)
    disk.remount("rw,size=64m")
    with contextlib.closing(Checkpoints(folder, CheckpointConfig())) as store:
        assert store.steps() == [3]
        assert_bits(store.parameters(3), values(3))
        save(store, 7)
        store.wait()
    with contextlib.closing(Checkpoints(folder)) as store:
        assert store.steps() == [3, 7]
        assert_bits(store.parameters(7), values(7))
    assert sorted(path.name for path in folder.iterdir()) == ["3", "7"]


def save_much(store: Checkpoints, step: int) -> None:
    """8 MB, which are not written at once."""
    parameters = one_device(values(step, ROWS_OF_A_LONG_SAVE))
    store.save(step, parameters, parameters, POSITION, METADATA | {"step": step})


@pytest.mark.parametrize("milliseconds", [0, 5, 20, 60])
def test_a_folder_that_vanishes_while_a_step_is_written(tmp_path, milliseconds):
    """Whatever of it orbax makes anew: the save has failed, and says why."""
    folder = tmp_path / "checkpoints"
    store = Checkpoints(folder, CheckpointConfig())
    save(store, 3)
    store.wait()
    save_much(store, 7)
    time.sleep(milliseconds / 1000)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(UserError, match=f"{folder}: a checkpoint was not written: the folder is gone; expected the on"):
        store.wait()
    with contextlib.suppress(UserError):
        store.close()


def test_a_bug_keeps_its_traceback(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    with contextlib.closing(store), pytest.raises(ValueError, match="Found empty item"):
        store.save(1, {}, {}, POSITION, METADATA)


def test_a_long_path_does_not_hide_what_the_system_said(tmp_path: Path) -> None:
    path = "/".join(["a_long_name"] * 60)
    said = f'PERMISSION_DENIED: Error writing "{path}": [OS error 30: EROFS Read-only file system]'
    with pytest.raises(UserError) as raised, failures.restoring(tmp_path):
        raise ValueError(f"{said} [source locations='{path}'] [tensorstore_spec='{{}}']")
    message = str(raised.value)
    assert message.startswith(f'{tmp_path} cannot be restored: PERMISSION_DENIED: Error writing "a_long')
    assert message.endswith("[OS error 30: EROFS Read-only file system]") and len(message) < len(str(tmp_path)) + 400
