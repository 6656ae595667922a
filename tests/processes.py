"""A job of several processes on this machine, as several hosts would run it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

SECONDS = 240  # after which a test has failed, and nothing of it is left running


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
    """Of each process, with so many devices of its own."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CPMJAX_HEARTBEAT_TIMEOUT": "10",
    }


def named(processes: int) -> list[dict[str, str]]:
    """What each process of a job finds in its environment about the job."""
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return [job | {"JAX_PROCESS_ID": str(number)} for number in range(processes)]


Job = subprocess.Popen[str]


@contextlib.contextmanager
def started(command: Sequence[str | Path], who: Sequence[Mapping[str, str]], devices: int = 1) -> Iterator[list[Job]]:
    """Python with these arguments, once for each of `who`; what still runs at the end is killed."""
    jobs: list[Job] = []
    try:
        for variables in who:
            # {VARIABLE} of an argument is that of the process.
            arguments = [str(part).format_map(variables) for part in command]
            jobs.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment(devices) | dict(variables),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def ends(jobs: Sequence[Job]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each, once all have ended."""
    end = time.monotonic() + SECONDS
    stderr = [job.communicate(timeout=max(1.0, end - time.monotonic()))[1] for job in jobs]
    return [(job.returncode, text) for job, text in zip(jobs, stderr, strict=True)]


def wait_until(moment: Callable[[], bool], jobs: Sequence[Job]) -> None:
    """Returns when `moment` has come, which it must while all jobs are running."""
    end = time.monotonic() + SECONDS
    while not moment():
        assert all(job.poll() is None for job in jobs), ends(jobs)
        assert time.monotonic() < end
        time.sleep(0.01)


def train(*arguments: str | Path, processes: int, devices: int = 1) -> list[str]:
    """Runs a training job that must end well; the stderr of each process."""
    with started(["-m", "cpmjax.train", *arguments], named(processes), devices) as jobs:
        found = ends(jobs)
    assert [code for code, _ in found] == [0] * processes, found
    return [stderr for _, stderr in found]


def error_lines(found: Sequence[tuple[int, str]]) -> list[str]:
    """The last line of each process, which must be its one error and no pages of C++ or Python."""
    for code, stderr in found:
        assert code not in (0, 75), stderr
        assert "Traceback" not in stderr and "stack trace" not in stderr and stderr.count("error:") == 1, stderr
    return [stderr.splitlines()[-1] for _, stderr in found]
