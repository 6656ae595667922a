"""Part of a test in a process of its own, with eight simulated devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def on_eight_devices(file: str, call: str, optimised: bool = False) -> str:
    """Calls `call` of the test in `file`, `check()` say, which must not raise; what it printed on stderr.

    By default with little optimisation: such programs are compiled for longer than they run.
    """
    flags = "--xla_force_host_platform_device_count=8"
    folders = [Path(__file__).parents[1], Path(__file__).parent, Path(file).parent]
    environment = os.environ | {
        "XLA_FLAGS": flags if optimised else f"{flags} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    module = Path(file).stem
    command = [sys.executable, "-c", f"import {module}; {module}.{call}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr
