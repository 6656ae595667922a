"""Studies of a run that may take hours, for `python -m cpmjax.study`: they say how far they are, and survive a kill."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cpmjax.analysis.atlas import run_atlas
from cpmjax.analysis.cost import describe_cost
from cpmjax.analysis.interpolation import barriers
from cpmjax.analysis.ledger import opened_ledger
from cpmjax.analysis.text import text_rows
from cpmjax.checkpoint.series import Series
from cpmjax.run import flags
from cpmjax.run.errors import UserError
from cpmjax.run.table import write_csv

_FEW_LAYERS = 8


def study_atlas(arguments: argparse.Namespace) -> int:
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


def study_barriers(arguments: argparse.Namespace) -> int:
    """How far the loss rises on the way from one checkpoint to another, over all pairs: for models of any size."""
    found = Series(arguments.run)
    steps = sorted(set(arguments.steps or found.steps))
    if len(steps) < 2:
        raise UserError(f"--steps: a barrier is between two checkpoints; expected at least two, got {steps}")
    directory = arguments.directory or found.path.with_name(f"{found.name}-barriers")
    batch = text_rows(found, _corpus(found, arguments.corpus), arguments.rows)
    pairs, tokens = len(steps) * (len(steps) - 1) // 2, batch["tokens"].size
    print(describe_cost(found, tokens, forward=len(steps) + pairs * arguments.inside), file=sys.stderr, flush=True)
    asked = {"inside": arguments.inside, "text": hashlib.sha256(batch["tokens"].tobytes()).hexdigest()[:12]}
    with opened_ledger(directory, "barriers", found, **asked) as known:
        between = barriers([(found, step) for step in steps], batch, arguments.inside, known)
    heights = between.heights()
    rows = [
        {"from": one, "to": other, "barrier": heights.value[i, j], "low": heights.low[i, j], "high": heights.high[i, j]}
        for (i, one), (j, other) in itertools.combinations(enumerate(steps), 2)
    ]
    losses = [
        {"step": step, "loss": loss} for step, loss in zip(steps, between.losses_NR.mean(1).tolist(), strict=True)
    ]
    write_csv(directory / "barriers.csv", rows)
    write_csv(directory / "losses.csv", losses)
    top = max(rows, key=lambda row: row["barrier"])
    height = f"{top['barrier']:.4f} [{top['low']:.4f}, {top['high']:.4f}] nats per token"
    print(
        f"{len(rows):,} pairs in {directory / 'barriers.csv'}; the highest, {height}, from {top['from']} to {top['to']}"
    )
    return 0


def _corpus(series: Series, named: str) -> dict[str, Any] | str:
    if named in series.config.data.corpora:
        return named
    return {"type": "text", "path": named} if Path(named).exists() else {"type": named}


def add_to(studies: Any) -> None:
    """The parsers of these studies; `study` of what they parse is the function that runs it."""
    _add_atlas(studies)
    _add_barriers(studies)


def _add_atlas(studies: Any) -> None:
    parser = studies.add_parser("atlas", help="what moves in the weights of a run, when, and with what spectra")
    parser.add_argument("run", type=Path, help="a run: trained here, or imported")
    parser.add_argument("--steps", type=flags.whole_numbers, help="of its checkpoints (default: all)")
    parser.add_argument(
        "--layers", type=flags.whole_numbers, help="whose spectra are taken (default: all of 8, else three of them)"
    )
    parser.add_argument("--directory", type=Path, help="for the results (default: RUN-atlas)")
    parser.set_defaults(study=study_atlas, experiment=None)


def _add_barriers(studies: Any) -> None:
    parser = studies.add_parser("barriers", help="how far the loss rises between the checkpoints of a run")
    parser.add_argument("run", type=Path, help="a run: trained here, or imported")
    parser.add_argument("--steps", type=flags.whole_numbers, help="of its checkpoints (default: all)")
    parser.add_argument("--inside", type=flags.positive, default=3, help="places on each way (default: 3)")
    parser.add_argument("--rows", type=flags.positive, default=16, help="of held-out text (default: 16)")
    parser.add_argument(
        "--corpus",
        default="standard_library",
        help="one of the run's, a folder of text, or a kind that needs no more (default: standard_library)",
    )
    parser.add_argument("--directory", type=Path, help="for the results (default: RUN-barriers)")
    parser.set_defaults(study=study_barriers, experiment=None)
