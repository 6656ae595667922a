"""Programs on a pseudo-terminal, for tests: what they show, what is typed."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_IN_ITS_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


@contextlib.contextmanager
def terminal(
    code: str, *arguments: str | Path
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str], Callable[[str], None]]]:
    """Runs some Python: yields (its process, wait(text) -> what was shown until then, type(text))."""
    ours, theirs = pty.openpty()
    # In a session of its own, with this terminal as the one whose Ctrl-C it gets.
    process = subprocess.Popen(
        [sys.executable, "-c", _IN_ITS_TERMINAL + code, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = bytearray()

    def wait(text: str) -> str:
        deadline = time.monotonic() + 60
        while text.encode() not in shown:
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([ours], [], [], 0.1)[0]:
                shown.extend(os.read(ours, 4096))
        before, _, after = bytes(shown).partition(text.encode())
        shown[:] = after
        return before.decode(errors="replace")

    def write(text: str) -> None:
        os.write(ours, text.encode())

    try:
        yield process, wait, write
    finally:
        process.kill()
        process.wait()
        os.close(ours)
