"""A job of several processes on this machine, as several hosts would run it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

SECONDS = 180  # after which a test has failed, and nothing of it is left running


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """Of each process, with so many devices of its own."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CPMJAX_START_TIMEOUT": "60",
        "CPMJAX_HEARTBEAT_TIMEOUT": "10",
    }


def named(processes: int) -> list[dict[str, str]]:
    """What each process of a job finds in its environment about the job."""
    address = f"127.0.0.1:{free_port()}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [job | {"JAX_PROCESS_ID": str(number)} for number in range(processes)]


@contextlib.contextmanager
def started(
    arguments: Callable[[int], list[str | Path]] | list[str | Path], who: list[Mapping[str, str]], devices: int = 1
) -> Iterator[list[subprocess.Popen[str]]]:
    """`python -m cpmjax.train` once for each of `who`; what still runs at the end is killed."""
    jobs: list[subprocess.Popen[str]] = []
    try:
        for number, variables in enumerate(who):
            given = arguments(number) if callable(arguments) else arguments
            jobs.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cpmjax.train", *map(str, given)],
                    env=environment(devices) | dict(variables),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield jobs
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
            if job.stderr is not None:
                job.stderr.close()
            job.wait()


def ends(jobs: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, once all have ended."""
    end = time.monotonic() + SECONDS
    found = []
    for job in jobs:
        _, stderr = job.communicate(timeout=max(1.0, end - time.monotonic()))
        found.append((job.returncode, stderr))
    return found


def train(*arguments: str | Path, processes: int, devices: int = 1) -> list[str]:
    """Runs a job that must end well; the stderr of each process."""
    with started(list(arguments), named(processes), devices) as jobs:
        found = ends(jobs)
    assert [code for code, _ in found] == [0] * processes, found
    return [stderr for _, stderr in found]


def wait_until(moment: Callable[[], bool], jobs: list[subprocess.Popen[str]]) -> None:
    end = time.monotonic() + SECONDS
    while not moment():
        assert all(job.poll() is None for job in jobs), [job.communicate() for job in jobs if job.poll() is not None]
        assert time.monotonic() < end
        time.sleep(0.01)
