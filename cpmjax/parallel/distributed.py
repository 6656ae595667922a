"""Several processes as one job: how they find each other, agree, and end together.

JAX's own distributed runtime does it: its coordination service, which lives in process 0, knows who is there, keeps
what they tell each other, and ends them all when one has died. What is here says who they are, from the environment,
and turns every end into one line. On a single process all of it does nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed as runtime  # jax.distributed, with the client that its users share
from jax.experimental import multihost_utils

from cpmjax.parallel import last_words
from cpmjax.run import cli
from cpmjax.run.errors import UserError
from cpmjax.run.identity import differences
from cpmjax.run.interrupt import SAVED_AND_STOPPED, StopRequest

T = TypeVar("T")

_NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
_FAILED = "cpmjax/failed"  # the key of the first failure
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SECONDS_TO_READ = 3.0  # in which every process has looked for a failure
_calls = itertools.count()
_joining, _leaving = threading.Event(), threading.Event()


# Who they are.


def cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; None where there is a single process.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID name the processes; or else JAX finds
    them where SLURM, Open MPI, GKE or a TPU slice has started several. Only variables are looked at: no other machine
    has network traffic of this. Raises UserError for variables that say nothing or contradict each other.
    """
    limits = {
        "initialization_timeout": _seconds(environment, "CPMJAX_START_TIMEOUT", 300),
        "heartbeat_timeout_seconds": _seconds(environment, "CPMJAX_HEARTBEAT_TIMEOUT", 100),
    }
    if not all(name in environment for name in _NAMED):
        if _detected(environment):
            return limits
        for given in filter(environment.__contains__, _NAMED):
            missing = _NAMED[1 - _NAMED.index(given)]
            raise UserError(f"{missing} is not set, but {given} is; expected both, with JAX_PROCESS_ID, or none")
        return None
    address = environment["JAX_COORDINATOR_ADDRESS"]
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdecimal():
        raise UserError(f"JAX_COORDINATOR_ADDRESS = {address!r}: expected HOST:PORT, both of process 0")
    processes = _number(environment, "JAX_NUM_PROCESSES", range(1, 10**6))
    number = _number(environment, "JAX_PROCESS_ID", range(processes))
    named = {"coordinator_address": address, "num_processes": processes, "process_id": number}
    # What else of SLURM or Kubernetes may be around is not asked.
    return named | limits | {"cluster_detection_method": "deactivate"} if processes > 1 else None


def _detected(environment: Mapping[str, str]) -> bool:
    """Whether JAX's own detection would find several processes; some of it asks servers, so that it is not asked."""
    if all(name in environment for name in _SLURM):
        return environment["SLURM_NTASKS"] != "1"
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return environment.get("OMPI_COMM_WORLD_SIZE") != "1"
    # JAX sets the first one where it has found the chips of a TPU and their library, and the second one where not.
    if environment.get("TPU_ML_PLATFORM") != "JAX" or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    return hosts is None or "," in hosts or environment.get("MEGASCALE_NUM_SLICES", "1") != "1"


def _number(environment: Mapping[str, str], name: str, allowed: range) -> int:
    text = environment.get(name, "")
    if not text.isdecimal() or int(text) not in allowed:
        raise UserError(f"{name} = {text!r}: expected a whole number from {allowed[0]} to {allowed[-1]}")
    return int(text)


def _seconds(environment: Mapping[str, str], name: str, default: int) -> int:
    return _number(environment, name, range(1, 10**6)) if name in environment else default


def is_first() -> bool:
    """Whether this is process 0: the one that writes the run directory and talks to the user."""
    return runtime.global_state.process_id == 0


def several() -> bool:
    return runtime.global_state.num_processes > 1


def name() -> str:
    return f"process {runtime.global_state.process_id} of {runtime.global_state.num_processes}"


# Beginning and end.


def main(job: Callable[[list[str]], int | None]) -> NoReturn:
    """`cpmjax.run.cli.main` for a job that may be several processes: one that fails waits for none of the others."""
    try:
        cli.main(job)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not _joining.is_set() or code in (0, SAVED_AND_STOPPED):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        # Threads that wait for other processes, and the coordination service, would keep it from ending.
        os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In a `with`, all processes of the job are one; entered before JAX has looked for its devices.

    Whatever happens to one, the others end with one line that says which and what: at once if it has raised, within
    CPMJAX_HEARTBEAT_TIMEOUT seconds if it was killed or its machine is gone. A process that does not come within
    CPMJAX_START_TIMEOUT seconds ends all that have.
    """
    settings = cluster(os.environ)
    if settings is None or jax.distributed.is_initialized():
        yield
        return
    if settings.get("process_id") == 0:
        _check_port(settings["coordinator_address"])
    _have_last_words(settings)
    _joining.set()
    try:
        jax.distributed.initialize(**settings)
    except (OSError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"jax.distributed.initialize: {message}; expected variables of a cluster or of cpmjax"
        ) from error
    if not several():  # a TPU slice of one machine
        yield
        return
    threading.Thread(target=_watch, name="watch", daemon=True).start()
    try:
        yield
    except BaseException as error:
        if _may_come_from_another(error):
            # The verdict of the coordination service, or of the process that has failed, ends this one meanwhile.
            time.sleep(settings["heartbeat_timeout_seconds"] + _SECONDS_TO_READ)
        _leave(error)
        if isinstance(error, UserError):
            raise UserError(f"{name()}: {error}") from error
        raise
    _leaving.set()
    jax.distributed.shutdown()  # once all are here


def _check_port(address: str) -> None:
    """Raises UserError if the coordination service could not have its port here; it might crash where it cannot."""
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS = {address!r}: expected a free port of this host ({error})"
        ) from error


def _have_last_words(settings: dict[str, Any]) -> None:
    """Gives what C++ writes on stderr to `last_words`; Python goes on with the stderr that it had."""
    # Who it is among others that JAX will find, only JAX knows, and it may end this process before it tells.
    known = "process_id" in settings
    called = f"process {settings['process_id']} of {settings['num_processes']}" if known else socket.gethostname()
    command = [sys.executable, "-I", "-S", last_words.__file__, called, str(settings["initialization_timeout"])]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert reader.stdin is not None
    sys.stderr.flush()
    sys.stderr = open(os.dup(2), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115 - as long as the process
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    reader.returncode = 0  # it outlives this process, and nobody waits for it


def _watch() -> None:
    """Ends this process when another one has told that it failed."""
    while not _leaving.wait(1.0):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has
            failure = _client().key_value_try_get(_FAILED)
            if not _leaving.is_set():
                print(f"error: {name()}: {failure}", file=sys.stderr, flush=True)
                os._exit(1)


def _leave(error: BaseException) -> None:
    """Tells the other processes of an error that this one ends with."""
    _leaving.set()
    words = " ".join(str(error).split())[:500]
    what = words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
        _client().key_value_set(_FAILED, f"process {runtime.global_state.process_id} has failed with: {what}")
    if is_first():  # the service ends with it
        time.sleep(_SECONDS_TO_READ)


def _may_come_from_another(error: BaseException | None) -> bool:
    """Whether it may be the end of a connection or of a barrier, which the end of another process leads to."""
    while error is not None:
        text, of_jax = str(error), isinstance(error, jax.errors.JaxRuntimeError)
        if (of_jax and "RESOURCE_EXHAUSTED" not in text) or "Gloo" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


# Agreement. Every process calls the same functions in the same order.


def first(make: Callable[[], T]) -> T:
    """What process 0 makes, JSON, on all processes; however long that takes."""
    if not several():
        return make()
    key = f"cpmjax/first/{next(_calls)}"
    if is_first():
        made = make()
        _client().key_value_set(key, json.dumps(made))
        return made
    while True:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # not yet
            return json.loads(_client().blocking_key_value_get(key, 10_000))


@contextlib.contextmanager
def first_ahead() -> Iterator[None]:
    """What stands in the `with` is done by process 0 alone, and then by all others at a time.

    Where they share a folder they find there what it has made; where they do not, each makes its own.
    """
    if not is_first():
        follow_first()
    yield
    if is_first():
        follow_first()


def follow_first() -> None:
    """Returns when process 0 has come here."""
    first(lambda: None)


def check_same(tree: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, unless `tree`, JSON, is that of process 0."""
    theirs = first(lambda: tree)
    for key, (there, here) in differences(theirs, json.loads(json.dumps(tree))).items():
        raise UserError(
            f"{key} is {json.dumps(here)}, but {json.dumps(there)} in process 0; "
            "expected the same command and the same files on all hosts"
        )


class AgreedStop(StopRequest):
    """A `StopRequest` of any process, granted to all of them at the same step.

    Of several, JAX takes the SIGTERM, from the start on, so that it waits for the first step: its preemption service
    finds, without holding up anyone, a step that none has reached yet. Asking whether this is it costs a microsecond.
    Steps are counted from here: to JAX, which begins at 0, those before a resumed one would be steps to come.
    """

    def __init__(self) -> None:
        super().__init__((signal.SIGINT,) if several() else (signal.SIGTERM, signal.SIGINT))
        self._asked = 0

    def granted(self) -> bool:
        """Whether to stop now; every process asks once a step."""
        if not several():
            return self.received is not None
        self._asked += 1
        if not multihost_utils.reached_preemption_sync_point(self._asked):
            return False
        self.received = self.received or "SIGTERM"
        return True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        super()._receive(number, frame)
        if several():
            os.kill(os.getpid(), signal.SIGTERM)


# Arrays of which a process may hold a part.


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array, on every process; a collective if they hold different parts of it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def place(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, where the sharding says."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _client() -> Any:
    return runtime.global_state.client
