"""libtpu on a machine without a TPU, where it is installed for plans alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # as a vendor of PCI devices


def keep_quiet() -> None:
    """Keeps jax's start what it is without libtpu: else that asks around for a machine of Google's, and complains.

    Does nothing where there is a TPU.
    """
    if importlib.util.find_spec("libtpu") is None or _has_tpu():
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)


def _has_tpu() -> bool:
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(vendor.read_text().strip() == _GOOGLE for vendor in vendors)
