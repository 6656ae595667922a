"""Plots: files that are pictures, whatever the records hold, and a range in which the decay can be seen."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from cpmjax.run import plots
from cpmjax.run.schedule import WSD


def records(schedule: WSD, first: int = 1) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(first, schedule.total + 1):
        share = schedule.factor(step)
        loss = 2 + 6 * (1 + step / 10) ** -0.6 - 0.3 * (1 - share) * (step > schedule.warmup)
        lines.append({"step": step, "tokens": step * 256, "loss": loss, "learning_rate": 0.01 * share})
        if step % 50 == 0:
            lines.append({"step": step, "tokens": step * 256, "heldout_loss": loss + 0.1, "heldout/code": loss})
    return lines


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


SCHEDULE = WSD(20, 400, 80)


def test_a_run_and_its_branch(tmp_path: Path) -> None:
    own, branch = records(SCHEDULE), SCHEDULE.branch(200)
    plots.draw(own, SCHEDULE.stages(), tmp_path / "trunk")
    plots.draw(records(branch, 201), branch.stages(), tmp_path / "branch", own)
    for run in ("trunk", "branch"):
        files = sorted(path.name for path in (tmp_path / run / "plots").iterdir())
        assert files == ["learning_rate.png", "loss.png"]
        assert all(is_png(tmp_path / run / "plots" / file) for file in files)


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1, "tokens": 9, "loss": math.nan, "learning_rate": 0.01}], records(SCHEDULE)[:3]]
)
def test_few_or_broken_values(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    plots.draw(lines, SCHEDULE.stages(), tmp_path)
    assert is_png(tmp_path / "plots" / "loss.png") and is_png(tmp_path / "plots" / "learning_rate.png")


def test_the_drop_of_the_decay_fills_a_good_part_of_the_height() -> None:
    axes = Figure().add_subplot()
    lines = records(SCHEDULE)
    plots._loss(axes, lines, [])
    loss = {line["step"]: line["loss"] for line in lines if "loss" in line}
    low, high = axes.get_ylim()
    assert low < loss[500] < loss[420] < high
    assert (loss[420] - loss[500]) / (high - low) > 0.15


def test_a_branch_shows_its_parent_only_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(plots, "_figure", lambda content, own, parent, stages, name: seen.append(parent) or b"")
    plots.draw(records(SCHEDULE.branch(200), 201), (), tmp_path, records(SCHEDULE))
    assert {max(line["step"] for line in parent) for parent in seen} == {200}


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(1, 20))
def test_running_mean(values: list[float], width: int) -> None:
    expected = [np.mean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
    np.testing.assert_allclose(plots._running_mean(np.array(values), width), expected, atol=1e-9)


def test_import_does_not_load_matplotlib() -> None:
    code = "import sys, cpmjax.run.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(plots.__file__).parents[2]).returncode == 0
