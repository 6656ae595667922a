"""Every notebook runs from a clean start; one without a series of its own says what its committed copy says."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from small_series import imported_history, small_series

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SERIES = re.compile(r'^SERIES = "\.\./runs/study"', re.MULTILINE)


def names(path: Path) -> str:
    return path.stem


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


STUDIES = [path for path in NOTEBOOKS if any(SERIES.search(cell.source) for cell in code(read(path)))]
ALONE = [path for path in NOTEBOOKS if path not in STUDIES]
# What weights and forward passes tell is told of an import too. The others need gradients, logs or branches.
NOT_OF_AN_IMPORT = {"curvature_in_decay", "noise_scale", "predict_the_decay", "sharpness", "two_stage_data"}


def executed(path: Path, series: Path | None = None) -> nbformat.NotebookNode:
    """The notebook run from top to bottom, on another series if one is given; nothing else in it is changed."""
    notebook = read(path)
    for cell in code(notebook) if series is not None else ():
        cell.source = SERIES.sub(f'SERIES = "{series}"', cell.source)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


def said(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell printed."""
    return [
        "".join(output["text"] for output in cell.outputs if output.output_type == "stream") for cell in code(notebook)
    ]


def pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_notebooks():
    assert len(ALONE) >= 2 and len(STUDIES) >= 10
    assert {path.stem for path in STUDIES} >= NOT_OF_AN_IMPORT


@pytest.mark.slow
@pytest.mark.parametrize("path", ALONE, ids=names)
def test_a_notebook_runs_and_says_what_is_committed(path):
    committed, now = read(path), executed(path)
    assert said(now) == said(committed)
    assert pictures(now) == pictures(committed) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=names)
def test_a_study_runs_on_a_small_series(path, tmp_path_factory):
    assert pictures(executed(path, small_series(tmp_path_factory))) == pictures(read(path)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in STUDIES if path.stem not in NOT_OF_AN_IMPORT], ids=names)
def test_a_study_runs_on_an_imported_history(path, tmp_path_factory):
    assert pictures(executed(path, imported_history(tmp_path_factory.getbasetemp()))) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_what_is_committed_came_from_one_run(path):
    """All of it was executed, in order, without an error."""
    cells = [cell for cell in code(read(path)) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_is_thin(path):
    """It calls the package and draws: nothing is defined in it."""
    for cell in code(read(path)):
        assert "def " not in cell.source and "class " not in cell.source
        assert len(cell.source.splitlines()) <= 40


@pytest.mark.parametrize("path", STUDIES, ids=names)
def test_a_study_says_what_it_costs_and_how_far_it_goes(path):
    text = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert re.search(r"weights|forward|gradient|logs", text[0]) and "cost" in text[0].lower()
    assert "found here" in text[-1].lower() and "does not show" in text[-1].lower()
