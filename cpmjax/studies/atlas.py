"""`study atlas RUN`: what moves in the weights of a run, when, how straight, and with what spectra."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpmjax.analysis.atlas import run_atlas
from cpmjax.checkpoint.series import Series
from cpmjax.run import flags

_FEW_LAYERS = 8


def add_to(studies: Any) -> None:
    parser = studies.add_parser("atlas", help="what moves in the weights of a run, when, and with what spectra")
    parser.add_argument("run", type=Path, help="a run: trained here, or imported")
    parser.add_argument("--steps", type=flags.whole_numbers, help="of its checkpoints (default: all)")
    parser.add_argument(
        "--layers", type=flags.whole_numbers, help="whose spectra are taken (default: all of 8, else three of them)"
    )
    parser.add_argument("--directory", type=Path, help="for the results (default: RUN-atlas)")
    parser.set_defaults(study=study, experiment=None)


def study(arguments: argparse.Namespace) -> int:
    """What moves in the weights of a run, when, how straight, and with what spectra: slice by slice, at any size."""
    found = Series(arguments.run)
    directory = arguments.directory or found.path.with_name(f"{found.name}-atlas")
    count = found.config.model.layers
    layers = range(count) if count <= _FEW_LAYERS else (0, count // 2, count - 1)
    with tqdm(unit="slice", mininterval=0.5 if sys.stderr.isatty() else 10) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh() if done == total else bar.update(0)

        rows = run_atlas(
            found,
            arguments.steps or found.steps,
            [*layers] if arguments.layers is None else arguments.layers,
            directory,
            progress,
        )
    print(f"{len(rows):,} rows in {directory / 'atlas.csv'}; notebooks/atlas_of_weights.ipynb reads them")
    return 0
