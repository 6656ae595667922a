"""The benchmark's structure, on a run of seconds; how fast anything is, is not for a test to say."""

from __future__ import annotations

import json
import statistics
import sys

import jax
import jobs
import pytest
import tunnel_jobs

from cpmjax import bench
from cpmjax.run import cli


@pytest.mark.slow
def test_train_measures_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_DEEP", 5)
    experiment = jobs.experiment(tmp_path, "never-used", schedule={"type": "wsd", "stable": 10_000})
    output = tmp_path / "results.json"
    caching = jax.config.jax_enable_compilation_cache
    try:
        bench.main(["train", f"--experiment={experiment}", "--rounds=1", "--steps=8", f"--output={output}"])
    finally:
        jax.config.update("jax_enable_compilation_cache", caching)
    report = json.loads(output.read_text())
    assert report["benchmark"] == "train" and report["experiment"] == experiment.name and report["steps"] == 8
    assert report["versions"].keys() >= {"python", "jax", "cpmjax"}
    assert report["machine"]["cores"] >= 1 and report["machine"]["memory_gib"] > 0
    assert report["mfu_formula"].startswith("MFU = tokens/s x ")

    measured = report["measurements"]
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


@pytest.mark.slow
def test_studies_compares_a_sweep_with_a_process_a_trial(tmp_path):
    experiment, output = tunnel_jobs.experiment(tmp_path), tmp_path / "results.json"
    cache = jax.config.values["jax_compilation_cache_dir"]
    try:
        bench.main(["studies", f"--experiment={experiment}", "--rates=2", "--seeds=1", f"--output={output}"])
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    report = json.loads(output.read_text())
    assert report["benchmark"] == "studies" and report["results_equal"] is True
    sweep, apart, share, *mapped = (each["median"] for each in report["measurements"])
    assert share == pytest.approx(100 * sweep / apart) and len(mapped) == 2 and min(mapped) > 0


def test_the_verdict_compares_the_median_with_the_bar():
    samples = [1.0, 1.1, 30.0]
    assert bench.Measurement("", "s", samples, bar=1.1).verdict == "within"
    assert bench.Measurement("", "s", samples, bar=1.0).verdict == "MISSED"
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
