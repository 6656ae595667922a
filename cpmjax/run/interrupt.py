"""SIGTERM and Ctrl-C as a wish: finish the step, save, and leave with a code that says so."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Self

SAVED_AND_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again to go on


class StopRequest:
    """In a `with`, the first of the signals sets `received`; a second one ends the process at once."""

    def __init__(self, signals: Iterable[signal.Signals] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self.received: str | None = None  # the signal's name
        self._signals = tuple(signals)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each, handler in self._before.items():
            signal.signal(each, handler)
