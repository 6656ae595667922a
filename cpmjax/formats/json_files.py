"""JSON that others wrote: an object of bounded size, or one line that says what is there instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpmjax.formats.tensors import map_file
from cpmjax.run.errors import UserError


def read_json(path: Path, largest: int = 2**20) -> dict[str, Any]:
    """The object in a file of at most `largest` bytes. Raises UserError for anything else."""
    text = map_file(path, "a JSON object")
    if text.size > largest:
        raise UserError(f"{path}: {text.size} bytes; expected a JSON object of at most {largest}")
    try:
        value = json.loads(text.tobytes())
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair, which is no text, in a string
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())}); expected a JSON object") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
