"""What figures share: bands that leave the axes as they are, a rate where one is known, a mark for every stage."""

from __future__ import annotations

import pytest
from analysis.synthetic import SCHEDULE, parameters, write_series
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cpmjax.analysis import drawing
from cpmjax.run import plots
from cpmjax.run.directory import Lines
from cpmjax.run.schedule import WSD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawing")


@pytest.fixture(scope="module")
def series(folder):
    return write_series(folder / "known", {step: parameters(step) for step in (10, 40, 60)})


@pytest.fixture(scope="module")
def unknown(folder):
    return write_series(folder / "unknown", {step: parameters(step) for step in (10, 60)}, known=False)


def axes_with_steps(series):
    axes = Figure().add_subplot()
    axes.plot(series.steps, range(len(series.steps)))
    return axes


def test_bands_lie_at_the_stages_in_their_colours(series):
    axes = axes_with_steps(series)
    before = axes.get_xlim()
    drawing.bands(axes, series)
    assert axes.get_xlim() == before
    bands = [
        (patch.get_x(), patch.get_x() + patch.get_width(), to_hex(patch.get_facecolor())) for patch in axes.patches
    ]
    shades = plots.SHADES
    assert bands == [(before[0], 10, shades["warmup"]), (10, 40, shades["stable"]), (40, 60, shades["decay"])]
    assert [text.get_text() for text in axes.texts] == ["warmup", "stable", "decay"]
    silent = axes_with_steps(series)
    drawing.bands(silent, series, names=False)
    assert len(silent.patches) == 3 and not silent.texts


def test_the_rate_is_that_of_the_checkpoints_where_there_is_no_log(series):
    twin = drawing.rate(axes_with_steps(series), series)
    (line,) = twin.get_lines()
    assert line.get_xdata().tolist() == [10, 40, 60]
    factor = WSD(SCHEDULE["warmup"], SCHEDULE["stable"], SCHEDULE["decay"]).factor
    assert line.get_ydata().tolist() == pytest.approx([0.01 * factor(step) for step in (10, 40, 60)])


def test_the_rate_is_that_of_every_logged_update_within_the_steps_asked_for(folder):
    series = write_series(folder / "logged", {step: parameters(step) for step in (10, 60)})
    lines = Lines(series.path / "metrics.jsonl")
    for step in range(1, 61):
        lines.append({"step": step, "learning_rate": step / 1000})
        lines.append({"step": step, "heldout_loss": 1.0})
    lines.close()
    (line,) = drawing.rate(axes_with_steps(series), series, [40, 20]).get_lines()
    assert line.get_xdata().tolist() == list(range(20, 41))
    assert line.get_ydata().tolist() == [step / 1000 for step in range(20, 41)]


def test_an_import_whose_schedule_nobody_knows_gets_neither(unknown):
    axes = axes_with_steps(unknown)
    drawing.bands(axes, unknown)
    assert not axes.patches and not axes.texts
    assert drawing.rate(axes, unknown) is None
    assert len(axes.figure.axes) == 1


def test_every_stage_has_a_mark_of_its_own():
    stages = [*plots.SHADES, "imported"]
    marks = [tuple(drawing.mark(stage).values()) for stage in stages]
    assert len({color for color, _ in marks}) == len({marker for _, marker in marks}) == len(stages)
