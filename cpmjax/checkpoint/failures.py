"""What a disk or a store that fails makes of a save or a restore: one line, and nothing printed beside it.

Orbax and tensorstore raise what they like, an OSError, a ValueError that begins with the name of a status, a bare
Exception, some of it from threads of their own. An error that is none of these is a bug and stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from cpmjax.checkpoint.object_stores import is_url
from cpmjax.run.errors import DiskFull, UserError

_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
_STATUS = re.compile(r"[A-Z_]{6,}: ")  # NOT_FOUND: Error writing ...
_LONGEST = 300  # characters of a reason


class Place:
    """The folder that a job writes to, on this machine or on a store; it may vanish, be replaced, or no longer be
    mounted. Orbax would make it again, under a mount point say, and go on."""

    def __init__(self, folder: epath.Path) -> None:
        self.folder = folder
        # Held open, so that no other folder gets its inode.
        self._number = None if is_url(folder) else os.open(folder, os.O_RDONLY)

    def vanished(self) -> bool:
        if self._number is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._number), os.stat(self.folder))
        except OSError:
            return True

    def check(self) -> None:
        if self.vanished():
            raise FileNotFoundError(f"{self.folder} is not the folder that it was")

    def close(self) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None


@contextlib.contextmanager
def saving(place: Place, complete: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Says what became of a checkpoint that cannot be written; `complete` looks which steps are there.

    Raises DiskFull where there is no room, else UserError.
    """
    folder = place.folder
    try:
        place.check()
        yield
        place.check()
    except UserError:
        raise
    except Exception as error:
        text, vanished = str(error), place.vanished()
        if not (vanished or is_url(folder) or isinstance(error, OSError) or _STATUS.match(text)):
            raise
        leave_to_the_caller()
        there = f"complete ones: {_listed(complete)}"
        if any(full in text for full in _FULL):
            message = f"no space left on the disk that holds {folder}: a checkpoint was not written; {there}"
            raise DiskFull(message) from error
        if vanished:
            reason, expected = "the folder is gone", "the one that was there when the job began"
        else:
            reason, expected = _reason(error), "a store that answers" if is_url(folder) else "a writable folder"
        raise UserError(f"{folder}: a checkpoint was not written: {reason}; expected {expected}; {there}") from error


def _listed(complete: Callable[[], Iterable[int]]) -> str:
    try:
        return ", ".join(map(str, sorted(complete()))) or "none"
    except Exception:  # where nothing can be written, nothing may be readable
        return "none that can be seen"


@contextlib.contextmanager
def restoring(folder: epath.Path) -> Iterator[None]:
    """Names what cannot be restored, with the first line of the reason that orbax or tensorstore gives."""
    try:
        yield
    except Exception as error:
        # Where data cannot be read, orbax raises a bare Exception; what tensorstore said is its cause.
        leave_to_the_caller()
        raise UserError(f"{folder} cannot be restored: {_reason(error.__cause__ or error)}") from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].partition(" [tensorstore_spec")[0].partition(" [source locations")[0]
    if len(text) > _LONGEST:  # a long path stands in the middle; what the system said is at the end
        text = f"{text[: _LONGEST // 3]}...{text[-2 * _LONGEST // 3 :]}"
    return text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax's warnings about its own defaults (a read-only manager, say) from the user; errors still raise."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def leave_to_the_caller() -> None:
    """From now on what fails to be saved or restored raises here, and prints nothing elsewhere.

    Each background thread of orbax would log a traceback of its own, some after the error was raised, and asyncio one
    for each write that nobody waits for any more; tensorstore's threads call back into loops that the error has closed,
    and reads that were given up complain when they are collected.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _unless_given_up


def _unless_given_up(unraisable: Any) -> None:
    coroutine = getattr(unraisable.object, "cr_code", None)
    given_up = coroutine is not None and "orbax" in coroutine.co_filename
    if not given_up and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
