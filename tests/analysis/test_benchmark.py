"""The benchmark of the atlas, on a model of kilobytes; how fast anything is, is not for a test to say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cpmjax.analysis.atlas import read_atlas
from cpmjax.checkpoint.series import Series
from cpmjax.model.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import studies_2b


@pytest.mark.slow
def test_both_atlases_are_measured_each_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", {"vocabulary": 60, "width": 16, "layers": 3, "heads": 2, "feed_forward": 24})
    found = list(studies_2b.measure(tmp_path, "small", checkpoints=3, layers=2))
    assert [(each["unit"], each["bar"]) for each in found] == [("s", None), ("GB", 4.0)] * 2
    assert all(each["sample"] > 0 for each in found)
    rows = read_atlas(tmp_path / "atlas-spectra")
    assert {row["step"] for row in rows} == {1000, 2000}
    assert {row.get("layer") for row in rows if "effective_rank" in row} == {None, 1, 2}
    rows = read_atlas(tmp_path / "atlas-movements")
    assert {row["step"] for row in rows} == {1000, 2000, 3000} and not any("effective_rank" in row for row in rows)

    down = [weights["layers"]["down"] for weights in map(Series(tmp_path / "small").parameters, (1000, 2000, 3000))]
    assert {str(array.dtype) for array in down} == {"bfloat16"}
    first, second, third = (np.asarray(array, np.float32) for array in down)
    assert first.std() == pytest.approx(0.03, rel=0.1)
    for update in (second - first, third - second):
        assert update.std() == pytest.approx(0.01, rel=0.1)
