"""A run on a mesh that does not divide its vocabulary: files, losses and samples are those of one device."""

from __future__ import annotations

import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest

import cpmjax
from cpmjax.model.parameters import flat, specs
from cpmjax.run import cli
from cpmjax.run.directory import RunDirectory

pytestmark = pytest.mark.slow

MESH = ("--mesh.data=1", "--mesh.fsdp=2", "--mesh.tensor=2")
ELSEWHERE = ("--mesh.data=1", "--mesh.tensor=4", "--run.accept_changes=[mesh]")
VOCABULARY = 321
MODEL = {"vocabulary": VOCABULARY, "width": 16, "layers": 1, "heads": 4, "feed_forward": 32, "tied": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.shared_folder(tmp_path_factory)


def close(found: Path, expected: Path) -> None:
    """The same lines and the same arrays, of the sizes that the model declares, within what meshes may differ in."""
    lines, others = jobs.records(found), jobs.records(expected)
    assert len(lines) == len(others) == 32
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, abs=1e-5, rel=1e-4), line["step"]
    config = cli.decode(RunDirectory(found).read_config(), str(found))
    shapes = {path: spec.shape for path, spec in flat(specs(config.model)).items()}
    arrays, expected_arrays = jobs.checkpoint_arrays(found, 32), jobs.checkpoint_arrays(expected, 32)
    assert {path: arrays[f"parameters/{path}"].shape for path in shapes} == shapes
    assert arrays.keys() == expected_arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, expected_arrays[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("adamw", ("--training.ema=0.9",)),
        ("adafactor", ("--optimizer.type=adafactor",)),
        ("schedule_free", ("--optimizer.type=schedule_free",)),
    ],
)
def test_a_run_with_an_odd_vocabulary(folder, kind, options):
    file = jobs.experiment(folder, f"odd-{kind}-one", model=MODEL)
    one, mesh = folder / f"odd-{kind}-one", folder / f"odd-{kind}-mesh"
    jobs.train(file, *options)
    jobs.train(file, *options, *MESH, f"--run.directory={mesh}", devices=4)
    close(mesh, one)

    # Its second half again, on another mesh and on one device: what it goes on from is of no mesh.
    for name, arguments, devices in (("elsewhere", ELSEWHERE, 4), ("alone", ("--run.accept_changes=[mesh]",), 1)):
        again = folder / f"odd-{kind}-{name}"
        shutil.copytree(mesh, again)
        for step in jobs.steps_of(again):
            if step > 15:
                shutil.rmtree(again / "checkpoints" / str(step))
        said = jobs.train(file, *options, *arguments, f"--run.directory={again}", devices=devices)
        assert "step 15 of 32" in said
        close(again, one)

    tokens = np.arange(300, VOCABULARY)[None]
    logits = [cpmjax.load(run, average=kind != "adafactor")(tokens) for run in (one, mesh)]
    assert logits[1].shape == (1, VOCABULARY - 300, VOCABULARY)
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-3, atol=1e-3)
