"""An output that is written slowly, in a process that can be killed."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from cpmjax.sampling.promptfile import continued

LINES = 200

# Forked from a process that has imported everything, so that each takes no time to start.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["cpmjax.sampling.promptfile"])


def start(path: Path) -> ForkServerProcess:
    process = _FORKS.Process(target=_write, args=(path,))
    process.start()
    return process


def _write(path: Path) -> None:
    with continued(path, {}, ({"index": index} for index in range(LINES))) as (lines, done):
        for index in range(done, LINES):
            lines.append({"index": index, "text": "y" * (1000 * (index % 7))})
            time.sleep(0.001)
