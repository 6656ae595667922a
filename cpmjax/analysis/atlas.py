"""The atlas of a series: what moves, when, how straight, and with what spectra; weights alone, slice by slice.

A row says of one slice at one checkpoint what `moves` says; of a matrix of the layers that were chosen, also what its
spectrum is, what that of its update is, and how far its leading directions are those of the checkpoint before and of
the first one. Rows with a head say what one head of such a layer does (see `circuits`): path is qk or ov.

In memory are one slice at four checkpoints (this one, the two before it, the first) and the work of a block: less than
4 GB of MiniCPM-2B in bfloat16, most of it the embedding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpmjax.analysis.spectra import Spectrum, circuits, effective_rank, mup_norm, overlap, spectrum, stable_rank
from cpmjax.analysis.trajectory import moves
from cpmjax.checkpoint.series import Series
from cpmjax.model.weights import Weights
from cpmjax.run.directory import Lines, RunDirectory, only_writer
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.table import Row, read_csv, write_csv

DIRECTIONS = 16  # leading singular directions whose turning is followed
_CIRCUITS = "circuits"
_READ_BY_CIRCUITS = ("attention_norm", "query", "key", "value", "output")


class _Unit(NamedTuple):
    """What is measured at one time. Its rows depend on nothing else, so they stand whatever steps are added later."""

    step: int
    before: int | None  # the checkpoint before it, the one before that, and the first one; None: there is none
    earlier: int | None
    first: int | None
    path: str
    layer: int | None
    spectra: bool

    @property
    def name(self) -> str:
        return json.dumps(self)

    @property
    def steps(self) -> set[int | None]:
        return {self.step, self.before, self.earlier, self.first} - {None}

    @property
    def compared(self) -> set[int | None]:
        """The steps whose spectra are compared."""
        return {self.step, self.before, self.first} - {None}


def measure(series: Series, steps: Sequence[int], layers: Sequence[int]) -> list[Row]:
    """All rows of an atlas, at once: for a series that is done in seconds.

    `layers` are those whose spectra are taken; if there are any, those of embedding and head as well. Raises UserError
    for a step or a layer that is not there.
    """
    return [row for _, rows in _measure(series, _plan(series, steps, layers)) for row in rows]


def run_atlas(
    series: Series,
    steps: Sequence[int],
    layers: Sequence[int],
    directory: str | Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """The same, written to DIRECTORY/atlas.csv, for a series that takes hours.

    Each slice is noted in DIRECTORY/ledger.jsonl when it is done: after a kill the same call goes on, and more steps
    at the end, or more layers, cost only what is new. `progress` is told how many slices of how many are done. Raises
    UserError as `measure`, for a directory with the atlas of another series, and if another process writes it.
    """
    directory, plan = Path(directory), _plan(series, steps, layers)
    with only_writer(directory, "atlas"):
        ledger = Lines(directory / "ledger.jsonl")
        try:
            known = _known(ledger, series)
            missing = [unit for unit in plan if unit.name not in known]
            before = len(plan) - len(missing)
            progress(before, len(plan))
            for done, (unit, rows) in enumerate(_measure(series, missing), before + 1):
                ledger.append({"unit": unit.name, "rows": rows})
                known[unit.name] = rows
                progress(done, len(plan))
        finally:
            ledger.close()
        found = [row for unit in plan for row in known[unit.name]]
        write_csv(directory / "atlas.csv", found)
    return found


def read_atlas(directory: str | Path) -> list[Row]:
    """The rows that `run_atlas` wrote; what a row lacks is no key of it. Raises UserError if there is no atlas."""
    return read_csv(Path(directory) / "atlas.csv")


def _known(ledger: Lines, series: Series) -> dict[str, list[Row]]:
    """{name of a unit: its rows} of a ledger of this series, which begins here if it is new."""
    made = {"fingerprint": fingerprint(series.config), "created": RunDirectory(series.path).provenance()["created"]}
    lines = Lines.read(ledger.path)
    if not lines:
        ledger.append({"series": made})
    elif lines[0].get("series") != made:
        raise UserError(f"{ledger.path}: is of another series; expected one of {series.path}, or another directory")
    return {line["unit"]: line["rows"] for line in lines[1:]}


def _plan(series: Series, steps: Sequence[int], layers: Sequence[int]) -> list[_Unit]:
    steps = sorted(set(steps))
    weights = series.weights(steps[0])
    for chosen in layers:
        if not 0 <= chosen < series.config.model.layers:
            raise UserError(f"layers: {series.path} has layers 0 to {series.config.model.layers - 1}, not {chosen}")
    plan = []
    for path, layer in weights.slices():
        spectra = weights.specs[path].role != "norm" and (layer in layers if layer is not None else bool(layers))
        others = zip([None, *steps], [None, None, *steps], [None, *[steps[0]] * len(steps)], strict=False)
        plan += [_Unit(step, *behind, path, layer, spectra) for step, behind in zip(steps, others, strict=False)]
    for chosen in sorted(set(layers)):
        plan += [_Unit(step, None, None, None, _CIRCUITS, chosen, True) for step in steps]
    return plan


def _measure(series: Series, plan: Iterable[_Unit]) -> Iterator[tuple[_Unit, list[Row]]]:
    opened: dict[int | None, Weights] = {}
    for (path, layer), group in itertools.groupby(plan, lambda unit: (unit.path, unit.layer)):
        units = list(group)
        _hold(opened, {step for unit in units for step in unit.steps}, series.weights)
        if path == _CIRCUITS:
            yield from ((unit, _of_circuits(opened[unit.step], unit)) for unit in units)
        else:
            yield from _of_slice(opened, path, layer, units)


def _of_slice(
    weights: dict[int | None, Weights], path: str, layer: int | None, units: Iterable[_Unit]
) -> Iterator[tuple[_Unit, list[Row]]]:
    arrays: dict[int | None, np.ndarray] = {}
    spectra: dict[int | None, Spectrum] = {}
    for unit in units:
        _hold(arrays, unit.steps, lambda step: weights[step].read(path, layer))
        now, before = arrays[unit.step], arrays.get(unit.before)
        moved = moves(now, before, arrays.get(unit.earlier), arrays.get(unit.first))
        row = {"step": unit.step, **_place(path, layer), **moved}
        if unit.spectra:
            _hold(spectra, unit.compared, lambda step: spectrum(arrays[step], DIRECTIONS))
            here = spectra[unit.step]
            row |= _of_values(here.values_R, now.shape)
            if before is not None:
                update = _of_values(spectrum(now, minus_IO=before).values_R, now.shape)
                row |= {f"update_{key}": value for key, value in update.items()}
                row |= _overlaps("", here, spectra[unit.before])
                row |= _overlaps("first_", here, spectra[unit.first])
        yield unit, [row]


def _of_circuits(weights: Weights, unit: _Unit) -> list[Row]:
    layer = {name: weights.read(f"layers/{name}", unit.layer) for name in _READ_BY_CIRCUITS}
    shape = (weights.config.width,) * 2
    return [
        {"step": unit.step, **_place(path, unit.layer), "head": head, **_of_values(values_K, shape)}
        for path, values_HK in circuits(weights.config, layer).items()
        for head, values_K in enumerate(values_HK)
    ]


def _place(path: str, layer: int | None) -> Row:
    return {"path": path} if layer is None else {"path": path, "layer": layer}


def _of_values(values_R: np.ndarray, shape: tuple[int, ...]) -> Row:
    largest = float(values_R[0])
    return {
        "largest_singular_value": largest,
        "mup_norm": mup_norm(largest, *shape),
        "stable_rank": float(stable_rank(values_R)),
        "effective_rank": float(effective_rank(values_R)),
    }


def _overlaps(name: str, one: Spectrum, other: Spectrum) -> Row:
    return {
        f"{name}input_overlap": overlap(one.input_IK, other.input_IK),
        f"{name}output_overlap": overlap(one.output_OK, other.output_OK),
    }


def _hold(held: dict[int | None, Any], steps: Set[int | None], make: Callable[[Any], Any]) -> None:
    """Lets go of what belongs to other steps, and only then makes what is missing: the largest slice is 0.6 GB."""
    for step in held.keys() - steps:
        del held[step]
    for step in steps - held.keys():
        held[step] = make(step)
