"""What the scripts beside this print, and `cpmjax.bench.measured_by` reads: JSON, a sample of a measurement a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def sample(
    name: str, unit: str, value: float, *, floor: float | None = None, bar: float | None = None
) -> dict[str, Any]:
    """One sample; samples of one name are one measurement, whose median should be `floor` at least, `bar` at most."""
    return {"name": name, "unit": unit, "sample": value, "floor": floor, "bar": bar}


def say(samples: Iterable[dict[str, Any]]) -> None:
    for each in samples:
        print(json.dumps(each), flush=True)
