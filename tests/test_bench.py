"""The benchmark's structure, on a run of seconds; how fast anything is, is not for a test to say."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jobs
import pytest
import tunnel_jobs

from cpmjax import bench
from cpmjax.run import cli
from cpmjax.run.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "benchmarks"))

import decoding
import full_size


@pytest.mark.slow
def test_train_measures_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_DEEP", 5)
    experiment = jobs.experiment(tmp_path, "never-used", schedule={"type": "wsd", "stable": 10_000})
    output = tmp_path / "results.json"
    caching = jax.config.jax_enable_compilation_cache
    try:
        small = ["--shapes=tiny", "--batches=2", "--megabytes=4", "--rounds=1", "--steps=8"]
        bench.main(["train", f"--experiment={experiment}", *small, f"--output={output}"])
    finally:
        jax.config.update("jax_enable_compilation_cache", caching)
    report = json.loads(output.read_text())
    assert report["benchmark"] == "train" and report["experiment"] == experiment.name and report["steps"] == 8
    assert report["versions"].keys() >= {"python", "jax", "cpmjax"}
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory_gib"] > 0
    assert report["mfu_formula"].startswith("MFU = tokens/s x ")

    beside, measured = report["measurements"][:-8], report["measurements"][-8:]
    found = {each["name"]: each["median"] for each in beside}
    for engine in ("cpmjax", "cpmjax huge pages"):
        assert found[f"{engine}, TINY, batch 2 x 512: training"] > 0
        assert 0.1 < found[f"{engine}, TINY, batch 2 x 512: memory"] < 10
    assert found["built / its own threads"] > 0
    bars = [(each["unit"], each["bar"]) for each in measured]
    assert bars == [
        ("s", None),
        ("s", None),
        ("", 1.2),
        ("s", 60),
        ("s", 15),
        ("%", 2),
        ("tokens/s", None),
        ("%", None),
    ]
    for each in measured:
        assert len(each["samples"]) == 1 and each["median"] == statistics.median(each["samples"]) >= 0
    shallow, deep, ratio, first, later = (each["median"] for each in measured[:5])
    assert ratio == pytest.approx(deep / shallow)
    assert first > 0.5 and later > 0.5  # no process starts jax and compiles in less
    assert not (tmp_path / "never-used").exists()

    shown = capsys.readouterr().out
    for each in measured:
        assert each["name"] in shown and f"{each['median']:.4g}" in shown
    assert str(report["machine"]) in shown


def test_scale_asks_its_scripts(tmp_path, monkeypatch, capsys):
    asked = []

    def measured_by(*arguments: str) -> list[bench.Measurement]:
        asked.append(arguments)
        return [bench.Measurement(arguments[0], "s", [1.0])]

    monkeypatch.setattr(bench, "measured_by", measured_by)
    output = tmp_path / "results.json"
    arguments = [f"--output={output}", f"--folder={tmp_path}", "--topologies", "v5e:2x2", f"--plot={tmp_path}/plot.png"]
    for installed in (True, False):
        asked.clear()
        monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name, found=installed: found or None)
        bench.main(["scale", "--rounds=2", *arguments])
        plans = [("scaling.py", "--topologies", "v5e:2x2", f"--plot={tmp_path}/plot.png")] if installed else []
        assert asked == [*plans, ("checkpoints.py", str(tmp_path), "--rounds=2")]
        assert [each["name"] for each in json.loads(output.read_text())["measurements"]] == [name for name, *_ in asked]
        assert ("libtpu is not installed" in capsys.readouterr().err) != installed


@pytest.mark.slow
def test_the_script_for_accelerators_runs_on_a_cpu_too(monkeypatch):
    small = ("--preset=tunnel-9m", "--length=64", "--rows=1", "--steps=1")
    found = {each.name: each.value for each in bench.measured_by("accelerator.py", *small)}
    name = "auto attention, 1 rows a device"
    assert found[f"throughput, {name}"] == pytest.approx(64 / found[f"step, {name}"])
    assert found[f"memory planned, {name}"] > 12 * 48e6 / 2**30  # the state of 48 M parameters
    assert found["attention alone, chunked, 1 x 64"] > 0 and "attention alone, splash, 1 x 64" not in found


@pytest.mark.slow
def test_studies_compares_a_sweep_with_a_process_a_trial(tmp_path):
    experiment, output = tunnel_jobs.experiment(tmp_path), tmp_path / "results.json"
    cache = jax.config.values["jax_compilation_cache_dir"]
    try:
        bench.main(
            [
                "studies",
                f"--experiment={experiment}",
                "--parts",
                "sweeps",
                "--rates=2",
                "--seeds=1",
                f"--output={output}",
            ]
        )
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    report = json.loads(output.read_text())
    assert report["benchmark"] == "studies" and report["experiment"] == experiment.name
    sweep, apart, share, other, *mapped = (each["median"] for each in report["measurements"])
    assert share == pytest.approx(100 * sweep / apart) and other == 0 and len(mapped) == 2 and min(mapped) > 0


@pytest.mark.slow
def test_convert_measures_every_conversion_and_every_reader(tmp_path, capsys):
    folder, output = tmp_path / "models", tmp_path / "results.json"
    arguments = [f"--folder={folder}", "--preset=tunnel-9m", "--rounds=1", "--mutants=20", f"--output={output}"]
    bench.main(["convert", *arguments])
    report = json.loads(output.read_text())
    assert report["benchmark"] == "convert" and report["preset"] == "tunnel-9m" and "experiment" not in report
    found = {each["name"]: each for each in report["measurements"]}
    for name in ("bin -> run", "safetensors -> run", "run -> hf", "run -> llama", "run -> gguf, q8_0", "gguf -> run"):
        ratio = found[f"{name}, times as long as cp"]
        assert ratio["median"] == pytest.approx(found[name]["median"] / found["cp"]["median"]) and ratio["bar"] == 3
        # No process imports jax in less, and a model of 0.1 GB takes no more.
        assert 0.05 < found[f"{name}, anonymous memory at most"]["median"] < 1.5
    written = {name: found[f"{name}, written"]["median"] for name in ("cp", "run -> hf", "run -> gguf, q8_0")}
    assert written["run -> hf"] == pytest.approx(written["cp"], rel=0.01)
    assert written["run -> gguf, q8_0"] / written["cp"] == pytest.approx(34 / 64, rel=0.01)  # bytes of 32 numbers
    findings = [each for name, each in found.items() if "findings among 20 mutants" in name]
    assert len(findings) >= 6 and all(each["median"] == each["bar"] == 0 for each in findings)
    assert sorted(path.name for path in folder.iterdir()) == ["bin", "safetensors"]  # products are gone
    assert "anonymous memory at most" in capsys.readouterr().out


@pytest.mark.slow
def test_sample_measures_every_engine_that_is_there(tmp_path, capsys):
    folder, output = tmp_path / "models", tmp_path / "results.json"
    arguments = [f"--folder={folder}", "--rounds=1", "--rows=12", f"--output={output}"]
    bench.main(["sample", *arguments, "--shapes", "tiny", "--sampling", "tiny"])
    report = json.loads(output.read_text())
    found = {each["name"]: each for each in report["measurements"]}
    there = [engine for engine in decoding.ENGINES if engine not in decoding.PEERS or find_spec(decoding.PEERS[engine])]
    for engine, batch in itertools.product(there, (1, 32)):
        about = f"{engine}, TINY, batch {batch}"
        first, rate = found[f"{about}: first token"], found[f"{about}: prompt and 128 tokens"]
        assert first["median"] > 0 and rate["median"] > 0
        assert len(rate["samples"]) == 1
    assert sorted(path.name for path in (folder / "tiny").iterdir()) == sorted(decoding.ENGINES)
    shares = [each for name, each in found.items() if "sampling, share of a step" in name]
    assert len(shares) == 1 and shares[0]["median"] > 0
    assert found["of 12 rows, those with other tokens than alone"]["median"] == 0
    furthest = found["largest difference of a log-probability, relative above 1"]
    assert furthest["median"] <= furthest["bar"] == 1e-4 and furthest["verdict"] == "within"
    assert report["versions"].keys() >= {"jax", "torch", "xllamacpp"}
    assert "share of the bandwidth limit" in capsys.readouterr().out


def test_the_file_that_is_converted_is_what_torch_loads(tmp_path):
    torch = pytest.importorskip("torch")
    config = ModelConfig(vocabulary=70, width=32, layers=2, heads=2, feed_forward=48)
    full_size.make(tmp_path, config)
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert sum(tensor.numel() for tensor in state.values()) == 70 * 32 + 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32)
    assert 0.015 < state["model.embed_tokens.weight"].float().std() < 0.025
    tensors = pytest.importorskip("safetensors.torch").load_file(tmp_path / "safetensors" / "model.safetensors")
    assert tensors.keys() == state.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, state[name]) for name, tensor in tensors.items())


def test_the_verdict_compares_the_median_with_the_bar():
    samples = [1.0, 1.1, 30.0]
    assert bench.Measurement("", "s", samples, bar=1.1).verdict == "within"
    assert bench.Measurement("", "s", samples, bar=1.0).verdict == "MISSED"
    assert bench.Measurement("", "s", samples, floor=1.1).verdict == "within"
    assert bench.Measurement("", "s", samples, floor=1.2).verdict == "MISSED"
    assert bench.Measurement("", "s", samples).verdict == ""


def test_the_share_of_waiting_is_read_from_the_job_s_last_words():
    said = "step 5\n1,200 tokens\n60 steps in 25.0 s, 9,830 tokens/s and MFU 1.0%; 0.5 s of it waiting for data\n"
    assert bench._share_of_waiting(said) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "BENCHMARK"),
        (["tran"], "'tran'"),
        (["train", "--rounds=many"], "'many'"),
        (["train", "--rounds=0"], "--rounds = 0"),
        (["train", "--experiment=nowhere.yaml"], "nowhere.yaml"),
        (["train", "--fast"], "--fast"),
        (["convert", "--mutants=0"], "--mutants"),
        (["sample", "--rows=0"], "--rows"),
        (["convert", "--preset=minicpm-9000b"], "minicpm-9000b"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main(bench.main)
    assert message in jobs.error_line(caught.value.code, capsys.readouterr().err)


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--help"])
    assert caught.value.code == 0
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["train", "--help"])
    assert "--experiment" in capsys.readouterr().out


def test_an_experiment_that_fails_says_why(tmp_path):
    experiment = tmp_path / "broken.yaml"
    experiment.write_text("modle: {width: 16}\n")
    with pytest.raises(bench.UserError, match=r"broken\.yaml: .*modle.*nearest: model"):
        bench.measure_runs(experiment, rounds=1, steps=2)
