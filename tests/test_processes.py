"""Jobs of several processes, on the loopback: they learn what one process learns, and end together."""

from __future__ import annotations

import signal
from pathlib import Path

import jobs
import numpy as np
import processes
import pytest

from cpmjax.run.interrupt import SAVED_AND_STOPPED

TRAIN = ("-m", "cpmjax.train")
SPLIT = ("--mesh.data=1", "--mesh.fsdp=2", "--mesh.tensor=2")  # parameters that no process of several holds whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def short(folder: Path) -> Path:
    return jobs.experiment(
        folder,
        "of-processes",
        schedule={"type": "wsd", "warmup": 2, "stable": 5, "decay": 5},
        checkpoint={"every": 10},
        evaluation={"every": 6, "rows": 6},
        training={"batch_size": 8, "accumulation": 2, "ema": 0.9},
        log={"tensorboard": True},
    )


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """More steps than a test waits for. At this rate the last bits of a sum stay last bits of the loss."""
    return jobs.experiment(
        folder,
        "endless",
        schedule={"type": "wsd", "warmup": 5, "stable": 100_000, "decay": 7},
        optimizer={"learning_rate": 0.001},
        checkpoint={"every": 10},
        evaluation={"every": 1000, "prompts": []},
    )


@pytest.fixture(scope="module")
def one_process(short: Path, folder: Path) -> Path:
    """The short experiment on four devices of one process."""
    jobs.train(short, f"--run.directory={folder / 'one-process'}", *SPLIT, devices=4)
    return folder / "one-process"


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in jobs.records(run)]


@pytest.mark.slow
@pytest.mark.parametrize("count, devices", [(2, 2), (4, 1)])
def test_processes_learn_what_one_process_does(folder: Path, short: Path, one_process: Path, count: int, devices: int):
    run = folder / f"{count}-processes"
    prompts = [] if count == 2 else ["--evaluation.prompts=[]"]  # whose programs take the longest to compile
    first, *others = processes.train(
        short, f"--run.directory={run}", *SPLIT, *prompts, processes=count, devices=devices
    )
    assert f"checkpoints  {run / 'checkpoints'}: 3, steps 7 to 12" in first
    assert others == [""] * (count - 1)
    found, expected = jobs.records(run), jobs.records(one_process)
    assert len(found) == 12 and "average/heldout_loss" in found[-1]
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for record, other in zip(found, expected, strict=True):
        for key, value in record.items():
            if isinstance(value, float):
                tolerance = 1e-6 if key == "loss" or "heldout" in key else 1e-5
                np.testing.assert_allclose(value, other[key], rtol=0, atol=tolerance, err_msg=key)
            else:
                assert value == other[key], key
    assert jobs.steps_of(run) == jobs.steps_of(one_process)
    theirs = jobs.checkpoint_arrays(one_process, 12)
    for name, array in jobs.checkpoint_arrays(run, 12).items():
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=1e-5, err_msg=name)
    written = {path.name for path in run.iterdir()}
    assert written == {path.name for path in one_process.iterdir()}
    if not prompts:
        assert (run / "samples.jsonl").read_bytes() == (one_process / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_stopped_killed_and_gone_on_with_other_numbers_of_processes_and_meshes(folder: Path, endless: Path):
    run, accept = folder / "elastic", "--run.accept_changes=[mesh]"

    def go_on(count: int, victim: int, number: signal.Signals, *mesh: str, devices: int = 1) -> list[tuple[int, str]]:
        before, lines = jobs.steps_of(run), jobs.lines_of(run)
        command = [*TRAIN, endless, f"--run.directory={run}", accept, *mesh]
        with processes.started(command, processes.named(count), devices) as started:
            processes.wait_until(lambda: jobs.lines_of(run) >= lines + 11, started)
            started[victim].send_signal(number)
            found = processes.ends(started)
        assert set(before) < set(jobs.steps_of(run))
        return [end for index, end in enumerate(found) if number != signal.SIGKILL or index != victim]

    # SIGTERM on one host stops all at the same step.
    found = go_on(2, 1, signal.SIGTERM)
    assert [code for code, _ in found] == [SAVED_AND_STOPPED] * 2, found
    step = jobs.steps_of(run)[-1]
    assert jobs.records(run)[-1]["step"] == step
    assert found[0][1].splitlines()[-1].startswith(f"SIGTERM: saved step {step} of ")
    assert found[1][1] == ""

    again = "run the same command again on all of them, it goes on from the newest checkpoint"
    found = go_on(4, 2, signal.SIGKILL, "--mesh.data=1", "--mesh.fsdp=-1")
    assert processes.error_lines(found) == [
        f"error: process {number} of 4: process 2 died or lost the network: {again}" for number in (0, 1, 3)
    ]
    found = go_on(2, 0, signal.SIGKILL, "--mesh.tensor=2", devices=2)
    assert processes.error_lines(found) == [
        f"error: process 1 of 2: process 0, which coordinates the others, has ended or lost the network: {again}"
    ]
    ((code, stderr),) = go_on(1, 0, signal.SIGTERM)
    assert code == SAVED_AND_STOPPED, stderr

    other = folder / "not-elastic"
    alone = jobs.start(endless, f"--run.directory={other}")
    steps = jobs.lines_of(run)
    assert jobs.signal_at(alone, lambda: jobs.lines_of(other) >= steps, signal.SIGTERM)
    jobs.finish(alone)
    records = jobs.records(run)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert [record["tokens"] for record in records] == [record["tokens"] for record in jobs.records(other)[:steps]]
    np.testing.assert_allclose(losses(run), losses(other)[:steps], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_host_that_never_joins_ends_the_others(folder: Path, endless: Path):
    who = [variables | {"CPMJAX_START_TIMEOUT": "5"} for variables in processes.named(3)]
    with processes.started([*TRAIN, endless, f"--run.directory={folder / 'absent'}"], who[:2]) as started:
        found = processes.ends(started)
    assert processes.error_lines(found) == [
        f"error: process {number} of 3: not all processes have joined within 5 s (CPMJAX_START_TIMEOUT): "
        "start all of them again"
        for number in (0, 1)
    ]
    assert not (folder / "absent").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        # The corpora are only where the first one looks for them.
        (
            ["--data.folder={FOLDER}/{JAX_PROCESS_ID}"],
            "{FOLDER}/1/words: no such file or folder; expected the documents of a corpus there",
        ),
        (
            ["--data.folder={FOLDER}/0", "--run.seed={JAX_PROCESS_ID}"],
            "run.seed is 1, but 0 in process 0; expected the same command and the same files on all hosts",
        ),
    ],
)
def test_what_one_host_refuses_all_hosts_tell(folder: Path, endless: Path, arguments: list[str], message: str):
    there = folder / "hosts"
    for seed, name in enumerate(("words", "others")):
        if not (there / "0" / name).exists():
            jobs.write_corpus(there / "0" / name, seed)
    who = [variables | {"FOLDER": str(there)} for variables in processes.named(2)]
    paths = [f"--data.corpora.{name}.path={name}" for name in ("words", "others")]
    command = [*TRAIN, endless, f"--run.directory={folder / 'refused'}", *paths, *arguments]
    with processes.started(command, who) as started:
        found = processes.ends(started)
    message = message.format(FOLDER=there)
    assert processes.error_lines(found) == [
        f"error: process 0 of 2: process 1 has failed with: {message}",
        f"error: process 1 of 2: {message}",
    ]
    assert found[1][0] == 2
    assert not (folder / "refused" / "config.yaml").exists()


LOADING = """
import sys
import jax, numpy as np
from cpmjax.data.loader import Loader
from cpmjax.parallel import distributed
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.sharding import named_sharding
from cpmjax.run.config import MeshConfig

with distributed.joined():
    asked = []
    def batch_at(position, size):
        asked.append([position, position + size])
        return {"tokens": np.arange(position, position + size, dtype=np.int32)[:, None] * np.ones(4, np.int32)}
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    sharding = named_sharding(mesh, ("rows", "length"), (8, 4), "batch")
    with Loader(batch_at, [(0, 8), (8, 16)], sharding) as loader:
        got = [distributed.fetch(batch["tokens"])[:, 0].tolist() for batch in loader]
    assert got == [list(range(8)), list(range(8, 24))], got
    # Of each batch the second process asks for the second half, a quarter for each of its devices.
    expected = [[0, 2], [2, 4], [8, 12], [12, 16]] if jax.process_index() == 0 else [[4, 6], [6, 8], [16, 20], [20, 24]]
    assert sorted(asked) == expected, asked
    assert distributed.first(lambda: {"from": jax.process_index()}) == {"from": 0}
    print("fine", file=sys.stderr)
"""


def test_each_process_reads_only_its_own_rows():
    with processes.started(["-c", LOADING.replace("{", "{{").replace("}", "}}")], processes.named(2), 2) as started:
        assert processes.ends(started) == [(0, "fine\n")] * 2
