"""Who the processes of a job are, from the environment; and the last words of one that JAX ends."""

from __future__ import annotations

import re
import socket
import subprocess
import sys

import processes
import pytest

from cpmjax.parallel import last_words
from cpmjax.parallel.distributed import cluster
from cpmjax.run.errors import UserError

LIMITS = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
ASK = """
from cpmjax.parallel import distributed
def job(argv):
    with distributed.joined():
        pass
distributed.main(job)
"""
TPU = {"TPU_ML_PLATFORM": "JAX"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        SLURM | {"SLURM_NTASKS": "1"},
        # A shell of an allocation, which is no step of it.
        {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},  # without a TPU
        TPU | {"TPU_WORKER_HOSTNAMES": "a"},
        TPU | {"TPU_SKIP_MDS_QUERY": "1"},
    ],
)
def test_a_single_process_joins_nothing(environment):
    assert cluster(environment) is None


@pytest.mark.parametrize(
    "environment",
    [SLURM, TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, TPU, {"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "2"}],
)
def test_jax_finds_those_that_a_cluster_has_started(environment):
    assert cluster(environment) == LIMITS


def test_explicit_addresses_go_before_those_of_a_cluster():
    named = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    times = {"CPMJAX_START_TIMEOUT": "5", "CPMJAX_HEARTBEAT_TIMEOUT": "6"}
    assert cluster(SLURM | named | times) == {
        "coordinator_address": "host:1",
        "num_processes": 3,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
        "initialization_timeout": 5,
        "heartbeat_timeout_seconds": 6,
    }


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID = '3': expected a whole number from 0 to 2"),
        ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID = '': expected a whole number from 0 to 2"),
        ({"JAX_NUM_PROCESSES": "many"}, "JAX_NUM_PROCESSES = 'many': expected a whole number from 1"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS = 'host': expected HOST:PORT"),
        ({"CPMJAX_START_TIMEOUT": "0"}, "CPMJAX_START_TIMEOUT = '0': expected a whole number from 1"),
        ({"JAX_NUM_PROCESSES": None}, "JAX_NUM_PROCESSES is not set, but JAX_COORDINATOR_ADDRESS is"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "JAX_COORDINATOR_ADDRESS is not set, but JAX_NUM_PROCESSES is"),
    ],
)
def test_variables_that_say_nothing_are_refused(changed, message):
    named = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    with pytest.raises(UserError, match=message):
        cluster({key: value for key, value in (named | changed).items() if value is not None})


def test_a_port_that_another_one_has_is_one_line():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        named = processes.named(2)[0] | {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{taken.getsockname()[1]}"}
        with processes.started(["-c", ASK], [named]) as started:
            ((code, stderr),) = processes.ends(started)
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert stderr.startswith("error: JAX_COORDINATOR_ADDRESS = '127.0.0.1:") and "a free port of this host" in stderr


def reader(text: str) -> str:
    """What comes of the text that the C++ of a process has written."""
    command = [sys.executable, "-I", "-S", last_words.__file__, "process 1 of 2", "300"]
    return subprocess.run(command, input=text, text=True, stderr=subprocess.PIPE, check=True).stderr


END = (
    "Terminating process because the JAX distributed service detected fatal errors. This most likely ... absl::Status: "
)
STACK = "*** Check failure stack trace: ***\n    @     0x7f4152040634  absl::log_internal::LogMessage::Flush()\n"


def record(kind: str, place: str, text: str) -> str:
    return f"{kind}1127 14:59:36.800569    5481 {place}] {text}\n"


@pytest.mark.parametrize(
    "status, line",
    [
        ("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask", "joined"),
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed.",
            "process 1 died or lost the network",
        ),
        (
            "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n12\nThe tasks have",
            "process 1, 12 died or lost the network",
        ),
        ("UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task", "process 0, which"),
        ("INTERNAL: something new", r"lost each other \(INTERNAL: something new\)"),
    ],
)
def test_the_end_of_a_process_is_one_line(status, line):
    before = record("E", "coordination_service_agent.cc:289", "Polled an error from coordination service")
    said = reader(before + record("F", "client.h:80", END + status) + STACK)
    assert re.match("error: process 1 of 2: .*" + line, said), said
    assert said.count("\n") == 1


def test_everything_else_is_passed_on():
    other = record("W", "cuda_dnn.cc:12", "a warning\nof two lines") + "and a line of no record\n"
    preempted = record("W", "preemption_notifier.cc:90", "SIGTERM caught at 2026")
    agent = record("E", "external/xla/coordination_service_agent.cc:289", "an error that it survived")
    crash = record("F", "gpu_executor.cc:7", "out of something") + STACK
    assert reader(other) == other
    assert reader(preempted + other) == other
    assert reader(agent + crash) == crash + agent
