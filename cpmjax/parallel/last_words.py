"""Reads what the C++ code of a process says on stderr, and says in one line why JAX ended it.

usage: python last_words.py NAME TIMEOUT < pipe

JAX's coordination service ends a process that has lost another one by aborting it in C++, after pages of its own, and
no code of the process can come between. This one is beside it, passes on what it says and has the last word. It needs
nothing but Python: it starts in milliseconds, before JAX has begun.
"""

from __future__ import annotations

import re
import signal
import sys

_RECORD = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.+/-]+):\d+\] ")  # how a record of C++ logging begins
_COORDINATION = re.compile(r"coordination_service\w*\.cc|client\.h")
_PREEMPTION = re.compile(r"preemption_\w+\.cc")  # a SIGTERM, of which the job tells itself
_FATAL = "the JAX distributed service detected fatal errors"
AGAIN = "run the same command again on all of them, it goes on from the newest checkpoint"


def explain(text: str, timeout: str) -> str | None:
    """The end of a process from what the coordination service wrote; None if it has not ended it.

    `timeout`: the seconds within which the processes had to find each other.
    """
    if _FATAL not in text:
        return None
    if "RegisterTask" in text:
        return f"not all processes have joined within {timeout} s (CPMJAX_START_TIMEOUT): start all of them again"
    if silent := re.search(r"stopped sending heartbeats\):?((?:[\s,]+\S*\b\d+)+)", text):
        numbers = ", ".join(re.findall(r"\b\d+\b", silent[1]))
        return f"process {numbers} died or lost the network: {AGAIN}"
    if "Failed to send RPC to coordination service" in text:
        return f"process 0, which coordinates the others, has ended or lost the network: {AGAIN}"
    status = text.partition(_FATAL)[2].partition("absl::Status: ")[2].partition("\n")[0]
    return f"the processes have lost each other ({status}): {AGAIN}"


def main(name: str, timeout: str) -> None:
    """Passes stdin on to stderr, record by record, until its end."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process itself
        signal.signal(number, signal.SIG_IGN)
    held, file = [], ""
    for raw in sys.stdin.buffer:
        line = raw.decode(errors="backslashreplace")
        if record := _RECORD.match(line):
            file = record[1].rpartition("/")[2]
        if _COORDINATION.fullmatch(file):
            held.append(line)
        elif not _PREEMPTION.fullmatch(file):
            print(line, end="", file=sys.stderr, flush=True)
    text = "".join(held)
    why = explain(text, timeout)
    print(text if why is None else f"error: {name}: {why}\n", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
