"""Plans: what the command prints for machines that are not here, against numbers counted by hand."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

from cpmjax.model.flops import training_flops_per_token
from cpmjax.model.presets import PRESETS
from cpmjax.plan import main, sampling_shape
from cpmjax.run import cli
from cpmjax.run.errors import UserError

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
MODEL = {"vocabulary": 512, "width": 64, "layers": 2, "heads": 4, "feed_forward": 128, "dim_model_base": 16}
PARAMETERS = 512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed"
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return jobs.experiment(tmp_path_factory.mktemp("plan"), "run", model=MODEL, training={"batch_size": 16})


def plan(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, "-m", "cpmjax.plan", *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder or ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )


def gib(text: str, kind: str) -> float:
    return float(re.findall(rf"^ *{kind} +([\d.]+)$", text, re.MULTILINE)[0])


def test_a_step_on_hosts_of_gpus(experiment, tmp_path):
    done = plan(experiment, "--topology=h100:4", "--slices=2", "--mesh.fsdp=4", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "h100:4, 8 devices in 2 slices (simulated on cpu); mesh data 2 x fsdp 4" in done.stdout
    assert f"{PARAMETERS:,} parameters" in done.stdout
    # Rows of both hosts learn one model: gradients go over the network, and parameters within a host.
    assert re.search(r"^all-reduce +data.* \(between slices\) ", done.stdout, re.MULTILINE)
    assert re.search(r"^all-gather +fsdp +\d", done.stdout, re.MULTILINE)
    assert not re.search(r"fsdp \(between slices\)", done.stdout.replace("data x fsdp", ""))
    config = cli.load([str(experiment)], PRESETS, "")
    flops = float(re.findall(r"^FLOPs +([\d.e+]+)", done.stdout, re.MULTILINE)[0])
    model = 16 * config.data.sequence_length * training_flops_per_token(config.model, config.data.sequence_length)
    assert 1 <= 8 * flops / model < 1.4  # attention goes through more than half of its pairs, and once more
    assert "fits         0.0" in done.stdout
    assert not [*tmp_path.iterdir()]


def test_sampling(experiment):
    done = plan(experiment, "--topology=cpu:2", "--sample=4x32+16", "--mesh.tensor=2")
    assert (done.returncode, done.stderr) == (0, "")
    prompts, token = done.stdout.split("for a token of each row")
    flops = [float(re.findall(r"^FLOPs +([\d.e+]+)", part, re.MULTILINE)[0]) for part in (prompts, token)]
    matrices = PARAMETERS - 5 * 64 - 512 * 64
    # Each device has half of every matrix; the head is for new tokens alone, and attention for little.
    assert 1 <= flops[0] / (2 * 4 * 32 * matrices / 2) < 1.3
    assert 1 <= flops[1] / (2 * 4 * (matrices + 512 * 64) / 2) < 1.3
    assert re.search(r"^all-reduce +tensor ", token, re.MULTILINE)


@pytest.mark.slow
def test_a_model_that_does_not_fit():
    one_row = ("--training.batch_size=1", "--training.accumulation=1")
    done = plan(EXPERIMENTS / "minicpm_2b.yaml", "--topology=rtx4090:1", *one_row)
    assert (done.returncode, done.stderr) == (1, "")
    assert gib(done.stdout, "parameters") == pytest.approx(2_724_880_896 * 4 / 2**30, abs=1e-3)
    assert gib(done.stdout, "optimizer") == pytest.approx(2_724_880_896 * 8 / 2**30, abs=1e-3)
    missing = float(re.findall(r"^does not fit by ([\d.]+) GiB", done.stdout, re.MULTILINE)[0])
    assert missing == pytest.approx(gib(done.stdout, "all") - 24e9 / 2**30, abs=0.01)
    remedies = done.stdout.split("; try\n")[1].splitlines()
    saved = [float(re.findall(r"\(about ([\d.]+) GiB less\)", line)[0]) for line in remedies]
    assert saved == sorted(saved, reverse=True)
    assert any("--optimizer.type=adafactor" in line for line in remedies)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minicpm_1b", "minicpm_2b"])
def test_the_published_recipes_on_eight_gpus(name):
    """Nothing full-size on a device: an eighth of the state each."""
    done = plan(EXPERIMENTS / f"{name}.yaml", "--topology=h100:8")
    assert done.stderr == ""
    count = int(re.findall(r"([\d,]+) parameters", done.stdout)[0].replace(",", ""))
    assert gib(done.stdout, "parameters") == pytest.approx(count * 4 / 8 / 2**30, abs=2e-3)
    assert gib(done.stdout, "optimizer") == pytest.approx(count * 8 / 8 / 2**30, abs=2e-3)


@needs_libtpu
@pytest.mark.slow
def test_the_published_recipe_on_a_slice_of_tpus():
    """Of 16 chips with 16 GiB each, a row of 4,096 tokens on every one; nothing but what the sharding calls for."""
    rows = ("--training.batch_size=16", "--training.accumulation=1")
    done = plan(EXPERIMENTS / "minicpm_2b.yaml", "--topology=v5e:4x4", *rows)
    assert (done.returncode, done.stderr) == (0, "")
    assert gib(done.stdout, "all") < 16
    sent = {
        (kind, axes): float(size)
        for kind, axes, size in re.findall(r"^([a-z-]+) +(\S+) +[\d,]+ +([\d.]+) +[\d.e-]+$", done.stdout, re.MULTILINE)
    }
    assert {axes for _, axes in sent} == {"fsdp"}
    # Each weight comes three times at most (forward, again, backward), and its gradient leaves once, in bfloat16; of
    # activations there are 2 x 4096 x 2304 numbers around the embedding. A gathered batch would be 16 times that each.
    weights = 2_724_880_896 * 2 / 1e9
    assert 3 * weights < sum(sent.values()) < 4.2 * weights


@needs_libtpu
def test_libtpu_changes_nothing_for_other_commands():
    program = "import jax; from cpmjax.run import cli; cli.main(lambda argv: print(jax.devices()[0].platform))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "the following arguments are required: --topology"),
        (("--topology=h10:8",), "--topology = 'h10:8': expected one of v4, v5e, .* or cpu.*; did you mean h100?"),
        (("--topology=v5e",), "expected sizes after a colon"),
        (("--topology=h100:0",), "expected sizes after a colon"),
        (("--topology=h100:8", "--slices=0"), "--slices = 0: expected 1 or more"),
        (("--topology=h100:8", "--sample=8x100+5"), "--sample = '8x100\\+5': expected ROWSxPROMPT\\+NEW"),
        (("--topology=h100:8", "--modle.width=3"), "modle: no such key"),
    ],
)
def test_what_is_no_plan_is_refused(experiment, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(experiment), *arguments])


def test_a_mesh_that_does_not_divide(experiment):
    done = plan(experiment, "--topology=cpu:8", "--mesh.data=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "mesh: data 3 does not fit 8 device(s)" in done.stderr
    done = plan(experiment, "--topology=cpu:5")
    assert done.returncode == 2 and "cannot be split over mesh data x fsdp = 5" in done.stderr


@needs_libtpu
def test_a_slice_that_does_not_exist(experiment):
    done = plan(experiment, "--topology=v5e:3x7")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "libtpu knows no such slice" in done.stderr


def test_shapes_of_sampling():
    assert sampling_shape("8x1024+128") == (8, 1024, 128)
