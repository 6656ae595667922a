"""Packages that only some corpora need, imported when one of those is read."""

from __future__ import annotations

import importlib
from types import ModuleType

from cpmjax.run.errors import UserError


def optional(module: str, what: str) -> ModuleType:
    """The module. Raises UserError if it is not installed; `what` is what needs it, in the message."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{what}: expected {package} installed (pip install 'cpmjax[corpora]')") from error
