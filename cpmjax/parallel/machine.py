"""What a result was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, and the kinds of jax's devices."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    devices = [device.device_kind for device in jax.devices()]
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "devices": devices}
