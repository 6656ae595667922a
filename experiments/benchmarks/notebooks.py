"""What each study takes: every notebook that studies a series, from a fresh kernel to its last cell.

    python experiments/benchmarks/notebooks.py SERIES [--names NAME...] [--rounds 1]

Its seconds, starting Python and compiling included, and the most memory that its process had. Nothing is written into
the notebooks. One line of JSON a sample. Needs what the tests need (nbclient, nbformat).
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import nbformat
from measured import sample, say
from nbclient import NotebookClient

_FOLDER = Path(__file__).parents[2] / "notebooks"
_LINE = re.compile(r"^SERIES = \"\.\./runs/study\".*$", re.MULTILINE)
_BAR = 300.0  # seconds
_PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def studies() -> dict[str, nbformat.NotebookNode]:
    """{name: notebook} of those that study a series."""
    notebooks = {path.stem: nbformat.read(path, as_version=4) for path in sorted(_FOLDER.glob("*.ipynb"))}
    return {
        name: notebook for name, notebook in notebooks.items() if any(_LINE.search(c.source) for c in notebook.cells)
    }


def main(series: Path, names: list[str], rounds: int) -> None:
    for name, notebook in studies().items():
        if names and name not in names:
            continue
        for cell in notebook.cells:
            cell.source = _LINE.sub(f'SERIES = "{series.absolute()}"', cell.source)
        notebook.cells.append(nbformat.v4.new_code_cell(_PEAK))
        for _ in range(rounds):
            began = time.perf_counter()
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(_FOLDER)}}).execute()
            seconds = time.perf_counter() - began
            peak = int(notebook.cells[-1].outputs[0]["text"]) / 2**20  # the kernel counts in KiB
            say([sample(f"{name}, time", "s", seconds, bar=_BAR), sample(f"{name}, peak memory", "GiB", peak)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    main(arguments.series, arguments.names, arguments.rounds)
