"""What every figure of the wind tunnel begins and ends with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from cpmjax.run.directory import write_atomically


def panels(rows: int, columns: int, width: float, height: float, sharey: bool = False) -> tuple[Any, Any]:
    """(figure, its panels [rows, columns]); width and height of a panel in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), dpi=90, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def save(figure: Any, path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_atomically(path, png.getvalue())
