"""The training step of MiniCPM-2B on more and more chips, planned: what each of them does, holds and sends.

    python experiments/benchmarks/scaling.py [--topologies v5e:4x4 ...] [--plot FILE.png] [--table FILE.md]

Weak scaling: a row of 4,096 tokens on each chip, parameters and moments over all of them (fsdp). Every step is compiled
for the slice, which is not there (`cpmjax.plan`; needs libtpu), and read: seconds to compile it, memory of a chip,
bytes that a chip sends, and the step's time at best by the data sheet. One line of JSON a measurement; a minute or two
a slice on 2 CPU cores. At more chips than rows of a batch in practice (960) the batch would have to grow.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from measured import sample, say

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.presets import PRESETS
from cpmjax.parallel.estimate import estimate
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.topologies import topology
from cpmjax.plan import GIB, Step, compile_step
from cpmjax.run import cli
from cpmjax.run.config import Config

_EXPERIMENT = Path(__file__).parents[1] / "minicpm_2b.yaml"
_COMPILES_WITHIN, _FITS_WITHIN = 180.0, 16.0  # seconds, GiB, for v5e:4x4
_MEASURED_FOR = "v5e:4x4"


class Row(NamedTuple):
    topology: str
    chips: int
    compiled: float  # seconds
    memory: float  # GiB
    sent: dict[str, float]  # GB of each kind of collective
    step: float  # seconds at best
    mfu: float


def planned(config: Config, name: str) -> tuple[Row, Step]:
    """One row of the experiment on each chip."""
    machine = topology(name)
    assert machine.chip is not None
    chips = len(machine.devices)
    training = replace(config.training, batch_size=chips, accumulation=1)
    config = replace(config, training=training)
    mesh = make_mesh(config.mesh, machine.devices)
    with jax.set_mesh(mesh):
        step = compile_step(config, mesh)
    guess = estimate(step.costs, machine.chip, machine.between_slices(mesh))
    length = config.data.sequence_length
    mfu = length * training_flops_per_token(config.model, length) / (guess.overlapped * machine.chip.flops)
    sent: dict[str, float] = {}
    for each in step.costs.collectives:
        sent[each.kind] = sent.get(each.kind, 0.0) + each.sent / 1e9
    return Row(name, chips, step.seconds, step.used.total / GIB, sent, guess.overlapped, mfu), step


def table(rows: list[Row]) -> str:
    """In Markdown."""
    kinds = sorted({kind for row in rows for kind in row.sent})
    head = [
        "slice",
        "chips",
        "compiled, s",
        "GiB a chip",
        "GB sent by a chip",
        *kinds,
        "s a step at best",
        "MFU at best",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        each = [f"{row.sent.get(kind, 0):.3g}" for kind in kinds]
        total = f"{sum(row.sent.values()):.1f}"
        cells = [row.topology, str(row.chips), f"{row.compiled:.0f}", f"{row.memory:.2f}", total, *each]
        lines.append(f"| {' | '.join([*cells, f'{row.step:.3f}', f'{row.mfu:.0%}'])} |")
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    chips, below = [row.chips for row in rows], [0.0] * len(rows)
    for kind, colour in zip(sorted({kind for row in rows for kind in row.sent}), _COLOURS, strict=False):
        sizes = [row.sent.get(kind, 0.0) for row in rows]
        axes.bar(range(len(rows)), sizes, bottom=below, label=kind, color=colour, width=0.6)
        below = [a + b for a, b in zip(below, sizes, strict=True)]
    axes.set_xticks(range(len(rows)), [f"{count}\n{row.topology}" for count, row in zip(chips, rows, strict=True)])
    axes.set_ylabel("GB sent by a chip in a step")
    axes.set_xlabel("chips, each with a row of 4,096 tokens")
    axes.set_title("MiniCPM-2B, parameters over all chips (fsdp), planned", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(file, dpi=150)


_COLOURS = ("#1f5f9e", "#c2410c", "#15803d", "#a16207", "#7e22ce")


def main(names: list[str], picture: Path | None, text: Path | None) -> None:
    config, rows = cli.load([str(_EXPERIMENT)], PRESETS, ""), []
    for name in names:
        row, _ = planned(config, name)
        rows.append(row)
        is_measured = name == _MEASURED_FOR
        say(
            [
                sample(f"compile, {name}", "s", row.compiled, bar=_COMPILES_WITHIN if is_measured else None),
                sample(f"memory of a chip, {name}", "GiB", row.memory, bar=_FITS_WITHIN if is_measured else None),
                sample(f"sent by a chip, {name}", "GB", sum(row.sent.values())),
                sample(f"step at best, {name}", "s", row.step),
                sample(f"MFU at best, {name}", "%", 100 * row.mfu),
            ]
        )
    rows.sort(key=lambda row: row.chips)
    if picture is not None:
        plot(rows, picture)
    if text is not None:
        text.write_text(table(rows) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=[_MEASURED_FOR])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    main(options.topologies, options.plot, options.table)
