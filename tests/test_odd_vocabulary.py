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
    for line, other in zip(jobs.records(found), jobs.records(expected), strict=True):
        assert line.pop("stage") == other.pop("stage")
        assert line == pytest.approx(other, abs=1e-5, rel=1e-4), line["step"]
    config = cli.decode(RunDirectory(found).read_config(), str(found))
    arrays, others = jobs.checkpoint_arrays(found, 32), jobs.checkpoint_arrays(expected, 32)
    assert arrays.keys() == others.keys()
    for path, spec in flat(specs(config.model)).items():
        for item in ("parameters", "average", "optimizer/1/mu", "optimizer/1/nu"):
            assert arrays[f"{item}/{path}"].shape == spec.shape
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_with_an_odd_vocabulary(folder: Path) -> None:
    file = jobs.experiment(folder, "odd-one", model=MODEL, training={"ema": 0.9})
    one, mesh, elsewhere = folder / "odd-one", folder / "odd-mesh", folder / "odd-elsewhere"
    jobs.train(file)
    jobs.train(file, *MESH, f"--run.directory={mesh}", devices=4)
    close(mesh, one)

    # Its second half again, on another mesh: what it goes on from is of no mesh.
    shutil.copytree(mesh, elsewhere)
    for step in jobs.steps_of(elsewhere):
        if step > 15:
            shutil.rmtree(elsewhere / "checkpoints" / str(step))
    assert "step 15 of 32" in jobs.train(file, *ELSEWHERE, f"--run.directory={elsewhere}", devices=4)
    close(elsewhere, one)

    tokens = np.arange(300, VOCABULARY)[None]
    logits = [cpmjax.load(run, average=True)(tokens) for run in (one, mesh)]
    assert logits[1].shape == (1, VOCABULARY - 300, VOCABULARY)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())
