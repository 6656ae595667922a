"""experiments/launch/: each way to start several processes, with what it calls played by small programs."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import processes
import pytest
import yaml

from cpmjax.parallel.distributed import cluster

LAUNCH = Path(__file__).parent.parent / "experiments" / "launch"

# ssh -n HOST COMMAND
SSH = """#!/bin/bash
[ "$1" = -n ] || exit 9
echo "$2" >> "$SEEN/hosts"
exec bash -c "$3"
"""
# Tasks of a step, all on this host. Those of real SLURM get the SIGTERM of a job as well.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_NODELIST=$NODES SLURM_NTASKS=2
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    echo $! > "$SEEN/task$task"
done
worst=0
for task in $(jobs -p); do
    wait "$task"; code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" > "$SEEN/scontrol"
"""
ASK = """
import sys, jax
from cpmjax.parallel import distributed
with distributed.joined():
    print(jax.process_index(), jax.process_count(), len(jax.devices()), file=sys.stderr)
"""


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """An environment in which ssh, srun, scontrol and python are these."""
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in {"ssh": SSH, "srun": SRUN, "scontrol": SCONTROL, "python": python}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    root = str(LAUNCH.parent.parent)
    found = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SEEN": str(tmp_path), "PYTHON": sys.executable}
    return processes.environment() | found | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More steps than a test waits for."""
    return jobs.experiment(
        jobs.shared_folder(tmp_path_factory),
        "launched",
        schedule={"type": "wsd", "warmup": 5, "stable": 100_000, "decay": 7},
        evaluation={"every": 1000, "prompts": []},
    )


def launch(script: str, *arguments: str | Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = ["bash", str(LAUNCH / script), *map(str, arguments)]
    # In a group of its own, so that whatever it started can be ended.
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def stopped(job: subprocess.Popen[str], run: Path, stop: Callable[[], None]) -> tuple[int, str]:
    """(exit code, stderr) of a job that is stopped when it has done a few steps."""
    try:
        processes.wait_until(lambda: jobs.lines_of(run) >= 5, [job])
        stop()
        return processes.ends([job])[0]
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_list_of_hosts(tmp_path: Path, programs: dict[str, str], endless: Path):
    hosts, run = tmp_path / "list", tmp_path / "the run"
    hosts.write_text("# the first one coordinates\n\nsomebody@localhost\nlocalhost  # the other\n")
    programs["PORT"] = str(processes.free_port())
    # The space has to pass two shells.
    job = launch("hosts.sh", hosts, endless, f"--run.directory={run}", environment=programs)
    code, stderr = stopped(job, run, lambda: job.send_signal(signal.SIGTERM))
    assert code == 75, stderr
    assert f"SIGTERM: saved step {jobs.steps_of(run)[-1]} of " in stderr
    # Two began at the same time, in either order; the last one is the word to stop, to the first of the list.
    *begun, told = (tmp_path / "hosts").read_text().splitlines()
    assert (sorted(begun), told) == (["localhost", "somebody@localhost"], "somebody@localhost")


@pytest.mark.slow
def test_slurm(tmp_path: Path, programs: dict[str, str], endless: Path):
    # JAX makes the port of the number of the job.
    number = processes.free_port() % 4096
    programs |= {"SLURM_JOB_ID": str(number), "NODES": "localhost,other[1-3]"}
    run = tmp_path / "run"
    job = launch("slurm.sh", endless, f"--run.directory={run}", environment=programs)

    def stop() -> None:
        os.kill(int((tmp_path / "task1").read_text()), signal.SIGTERM)

    code, stderr = stopped(job, run, stop)
    assert code == 75, stderr
    assert f"SIGTERM: saved step {jobs.steps_of(run)[-1]} of " in stderr
    assert (tmp_path / "scontrol").read_text() == f"requeue {number}\n"
    options = re.findall(r"^#SBATCH --(\S+?)=", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "signal"} <= set(options)


def manifest(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Service, Job) of a file, which must belong together."""
    service, job = yaml.safe_load_all((LAUNCH / name).read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    # Pods of an indexed Job have names of their own where a headless Service is their subdomain.
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "cpmjax.train"]
    assert (LAUNCH.parent.parent / container["args"][0]).is_file()
    assert all(
        rule.get("onExitCodes", {}).get("containerName", "train") == container["name"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
    )
    return job, container


def test_kubernetes_with_gpus():
    job, container = manifest("kubernetes_gpu.yaml")
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"

    def variables(pod: int) -> dict[str, str]:
        found = {}
        for entry in container["env"]:
            field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            assert field in (None, index)
            found[entry["name"]] = str(pod) if field else entry["value"]
        # What Kubernetes adds must not matter.
        return found | {"JOB_COMPLETION_INDEX": str(pod), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}

    count = job["spec"]["completions"]
    settings = cluster(variables(1))
    assert settings is not None
    assert (settings["num_processes"], settings["process_id"]) == (count, 1)
    name = job["metadata"]["name"]
    assert settings["coordinator_address"].startswith(f"{name}-0.{job['spec']['template']['spec']['subdomain']}:")
    address = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{processes.free_port()}"}
    who = [variables(pod) | address for pod in range(count)]
    with processes.started(["-c", ASK], who) as started:
        assert processes.ends(started) == [(0, f"{pod} {count} {count}\n") for pod in range(count)]


def test_kubernetes_with_a_tpu_slice():
    job, container = manifest("kubernetes_tpu.yaml")
    topology = job["spec"]["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert job["spec"]["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert "env" not in container
