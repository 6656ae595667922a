"""The public curves of the multi-power law: its authors' parameters, and the schedules that they were fitted to.

Luo et al. (2503.12811) trained models of 25, 100 and 400 million parameters with nine schedules each, fitted their law
to three of them, and published the curves and the parameters (github.com/thu-yao-01-luo/MultiPowerLaw, MIT). The
parameters and the last losses stand here; the curves are read from a copy of the repository.

S updates, T losses.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from cpmjax.analysis.decay_prediction import Curve
from cpmjax.analysis.multi_power import MultiPower
from cpmjax.run.errors import UserError

# By millions of parameters. The rises of the warm-up count as negative drops in these fits.
FITTED = {
    25: MultiPower(3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    100: MultiPower(2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    400: MultiPower(2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}
SEEN = ("constant_24000", "cosine_24000", "wsdcon_9")  # what they were fitted to
NOT_SEEN = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")
WSD = "wsd_20000_24000"

# The last loss of a log, and after how many updates it was taken.
LAST = {
    25: {"constant_24000": (23937, 3.3473), "cosine_24000": (23921, 3.3044), WSD: (23905, 3.2766)},
    100: {"constant_24000": (23937, 3.0354), "cosine_24000": (23921, 2.9791), WSD: (23905, 2.9514)},
    400: {"constant_24000": (23937, 2.8167), "cosine_24000": (23921, 2.7396), WSD: (23937, 2.7222)},
}
LAST_OF_WSD = {25: 3.2669, 100: 2.9360, 400: 2.7005}  # as these parameters foretell it
MEAN_ERRORS = {25: 0.00376, 100: 0.00435, 400: 0.00484}  # published: mean of |error| of a curve, over those not seen
R2 = {25: 0.9988, 100: 0.9983, 400: 0.9978}  # published: the same mean of the share of variance explained

_PEAK, _FLOOR, _WARMUP = 3e-4, 3e-5, 2160


def rates(name: str) -> np.ndarray:
    """float64 [S]: the rate of every update of the schedule that a file is named after."""
    kind, *numbers = name.split("_")
    lengths = [int(number) for number in numbers]
    total = 16_000 if kind == "wsdcon" else lengths[-1]
    after = {"constant": total, "cosine": _WARMUP, "wsdcon": 8_000}.get(kind, lengths[0])
    x = np.arange(total - after) / max(total - after, 1)
    falling = {
        "constant": x,
        "cosine": _FLOOR + (_PEAK - _FLOOR) * (1 + np.cos(math.pi * x)) / 2,
        "wsd": _PEAK * (_FLOOR / _PEAK) ** x,
        "wsdld": _PEAK + (_FLOOR - _PEAK) * x,
        "wsdcon": np.full(len(x), lengths[0] * 1e-5),
    }[kind]
    return np.concatenate([np.linspace(0, _PEAK, _WARMUP), np.full(after - _WARMUP, _PEAK), falling])


def read(folder: str | Path, size: int) -> dict[str, Curve]:
    """The nine curves of one size from `folder`/csv_SIZE/NAME.csv, whose columns are step, lr and loss.

    A loss at step s, counted from 0, is that after update s + 1. Raises UserError for a file that is not there or not
    such a table.
    """
    return {name: _read(Path(folder) / f"csv_{size}" / f"{name}.csv") for name in (*SEEN, *NOT_SEEN)}


def _read(file: Path) -> Curve:
    found_S = rates(file.stem)
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = [(int(row["step"]) + 1, float(row["loss"])) for row in csv.DictReader(lines)]
        steps_T, losses_T = np.array([row for row in rows if row[0] <= len(found_S)]).T
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{file}: {what}; expected a table of the columns step, lr and loss") from error
    return Curve(file.stem, found_S, steps_T.astype(int), losses_T)
