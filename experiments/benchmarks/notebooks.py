"""What each study takes: every notebook that studies a series, from a fresh kernel to its last cell.

    python experiments/benchmarks/notebooks.py SERIES [--names NAME...] [--rounds 1] [--write]

Its seconds, starting Python and compiling included, and the most memory that its process had. With --write, for the
series that the notebooks name themselves, what they print and draw is kept in them. One line of JSON a sample. Needs
what the tests need (nbclient, nbformat).
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


def main(series: Path, names: list[str], rounds: int, write: bool) -> None:
    for name, notebook in studies().items():
        if names and name not in names:
            continue
        for cell in notebook.cells if not write else ():
            cell.source = _LINE.sub(f'SERIES = "{series.absolute()}"', cell.source)
        peak = nbformat.v4.new_code_cell(_PEAK)
        for _ in range(rounds):
            notebook.cells.append(peak)
            began = time.perf_counter()
            NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(_FOLDER)}}).execute()
            seconds = time.perf_counter() - began
            notebook.cells.remove(peak)
            gib = int(peak.outputs[0]["text"]) / 2**20  # the kernel counts in KiB
            say([sample(f"{name}, time", "s", seconds, bar=_BAR), sample(f"{name}, peak memory", "GiB", gib)])
        if write:
            nbformat.write(notebook, _FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    parser.add_argument("--names", nargs="+", default=[])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.write and arguments.series.resolve() != (_FOLDER.parent / "runs" / "study").resolve():
        parser.error("--write: expected runs/study, the series that the notebooks name")
    main(arguments.series, arguments.names, arguments.rounds, arguments.write)
