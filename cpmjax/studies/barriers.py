"""`study barriers RUN`: how far the loss rises between the checkpoints of a run."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from pathlib import Path
from typing import Any

from cpmjax.analysis.cost import describe_cost
from cpmjax.analysis.interpolation import barriers
from cpmjax.analysis.ledger import opened_ledger
from cpmjax.analysis.text import text_rows
from cpmjax.checkpoint.series import Series
from cpmjax.run import flags
from cpmjax.run.errors import UserError
from cpmjax.run.table import write_csv
from cpmjax.studies.common import say


def add_to(studies: Any) -> None:
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
    parser.set_defaults(study=study, experiment=None)


def study(arguments: argparse.Namespace) -> int:
    """How far the loss rises on the way from one checkpoint to another, over all pairs: for models of any size."""
    found = Series(arguments.run)
    steps = sorted(set(arguments.steps or found.steps))
    if len(steps) < 2:
        raise UserError(f"--steps: a barrier is between two checkpoints; expected at least two, got {steps}")
    directory = arguments.directory or found.path.with_name(f"{found.name}-barriers")
    batch = text_rows(found, _corpus(found, arguments.corpus), arguments.rows)
    pairs, tokens = len(steps) * (len(steps) - 1) // 2, batch["tokens"].size
    say(describe_cost(found, tokens, forward=len(steps) + pairs * arguments.inside))
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
