"""MiniCPM in JAX: pre-training with explicit muP and a warmup-stable-decay schedule.

The names below are what a notebook needs; they are imported when first used, so that `import cpmjax` is cheap and
starts no JAX backend. The jobs are modules: `python -m cpmjax.train --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpmjax.checkpoint.series import Series
    from cpmjax.formats.loading import load, load_tokenizer
    from cpmjax.run.errors import UserError
    from cpmjax.sampling.sampler import Sampler

_HOMES = {
    "Sampler": "cpmjax.sampling.sampler",
    "Series": "cpmjax.checkpoint.series",
    "UserError": "cpmjax.run.errors",
    "load": "cpmjax.formats.loading",
    "load_tokenizer": "cpmjax.formats.loading",
}

__all__ = ["Sampler", "Series", "UserError", "load", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cpmjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
