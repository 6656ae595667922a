"""The batch-size study: what it plans and measures, its judgement of made-up runs, and the command."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import tunnel_jobs
from tunnel_jobs import run_study as run
from tunnel_jobs import without_clock

from cpmjax import study
from cpmjax.analysis.batch_law import BatchLaw
from cpmjax.run.directory import Lines
from cpmjax.run.errors import UserError
from cpmjax.run.table import read_csv
from cpmjax.tunnel import batch_size
from cpmjax.tunnel.batch_size_figures import contours, law
from cpmjax.tunnel.sizes import Axis

SCHEDULE = {"type": "constant", "unit": "tokens", "warmup": 128, "length": 896}  # 32 rows of 32 tokens
BATCHES = (128, 256, 512, 1024, 2048, 4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def config(folder):
    """The small tunnel with the study's schedule."""
    return tunnel_jobs.config(folder, *(f"--schedule.{key}={value}" for key, value in SCHEDULE.items()))


# Made-up runs.


def rows(planted: BatchLaw, noise: BatchLaw = BatchLaw(2e5, 4.0), seeds=3, spread=0.003, sizes=(32, 64)):
    """A table of runs with this law of the best batch, and with this one of the noise scale."""
    losses, tokens = np.geomspace(7, 2.5, 2000), np.geomspace(16_384, 786_432, 25).round()
    found, rng = [], np.random.default_rng(1)
    for size in sizes:
        for batch in BATCHES:
            best = planted.batch(losses)
            needed = 3e11 * 32 / size / losses**11 * (1 + batch / best + best / batch)
            curve = np.interp(np.log(tokens), np.log(needed), losses)
            for seed in range(seeds):
                labels = {"axis": "width", "width": size, "batch": batch, "learning_rate": 0.01, "seed": seed}
                for point, (at, loss) in enumerate(zip(tokens, curve + spread * rng.normal(size=25), strict=True)):
                    row = labels | {"status": "finished", "tokens": int(at), "heldout_loss": loss}
                    if point % 6 == 5:
                        row |= {"gradient_signal": 128.0 / noise.batch(loss), "gradient_noise": 1.0}
                        row |= {"gradient_signal_error": 1e-4, "gradient_noise_error": 1e-4, "gradient_tokens": 128.0}
                    found.append(row)
    return found


def judged(table):
    found = batch_size.Found(batch_size.sizes(table))
    return found, {verdict.subject + " " + verdict.criterion: verdict for verdict in batch_size.verdicts(found)}


def test_both_planted_laws_are_found_and_pass():
    found, verdicts = judged(rows(BatchLaw(1.2e6, 5.0)))
    assert found.p.value == found.law().p == pytest.approx(5, rel=0.04) and found.p.low < 5 < found.p.high
    assert found.noise_p.value == pytest.approx(4, rel=0.02)
    assert found.noise().batch(4.0) == pytest.approx(2e5 / 4**4, rel=0.02)
    assert max(found.apart) < 1.1 and len(found.apart) > 8
    assert len(verdicts) == 3 and all(verdict.passed for verdict in verdicts.values())
    said = batch_size.describe(found)
    assert "1.21e+09 / L^6.24" in said and "width 32" in said and "jackknife over 3 seeds" in said


def test_a_best_batch_that_stays_or_falls_fails():
    for planted in (BatchLaw(700, 0.0), BatchLaw(700 / 4**2, -2.0)):
        found, verdicts = judged(rows(planted))
        assert found.law().p == pytest.approx(planted.p, abs=0.3)
        assert not verdicts["best batch grows as the loss falls"].passed
        assert verdicts["best batch lies inside of those measured"].passed


def test_best_batches_beyond_those_measured_fail():
    _, verdicts = judged(rows(BatchLaw(1e9, 5.0)))
    assert verdicts["best batch lies inside of those measured"].measured.startswith("0 of ")
    assert not any(verdict.passed for name, verdict in verdicts.items() if name.startswith("best"))


def test_a_noise_scale_that_does_not_grow_fails():
    _, verdicts = judged(rows(BatchLaw(1.2e6, 5.0), noise=BatchLaw(500, 0.0)))
    assert [verdict.passed for verdict in verdicts.values()] == [True, True, False]


def test_seeds_that_disagree_or_a_single_one_prove_nothing():
    each = [rows(BatchLaw(700 * 4**p, p), seeds=1) for p in (8.0, 0.0, 1.0)]
    disagreeing = [row | {"seed": seed} for seed, table in enumerate(each) for row in table]
    for table in (disagreeing, rows(BatchLaw(1.2e6, 5.0), seeds=1)):
        found, verdicts = judged(table)
        assert found.p.low < 0 < found.law().p and not verdicts["best batch grows as the loss falls"].passed


def test_sizes_that_differ_at_one_loss_are_seen():
    apart = rows(BatchLaw(1.2e6, 5.0), sizes=(32,)) + rows(BatchLaw(2.4e6, 5.0), sizes=(64,))
    assert np.median(judged(apart)[0].apart) == pytest.approx(2, rel=0.05)


def test_a_run_that_diverged_counts_until_then_and_one_that_failed_not_at_all():
    table = rows(BatchLaw(1.2e6, 5.0))
    labels = {"axis": "width", "width": 64, "learning_rate": 0.01}
    gone = [
        row | {"status": "diverged"} if (row["width"], row["batch"], row["seed"]) == (64, 128, 1) else row
        for row in table
        if (row["width"], row["batch"], row["seed"]) != (64, 128, 1) or row["tokens"] < 100_000
    ]
    gone.append(labels | {"batch": 256, "seed": 7, "status": "failed"})
    runs = batch_size.sizes(gone)[1]
    assert runs.seeds == 3 and math.isinf(runs.curves()[0][1][-1]) and math.isfinite(runs.curves()[0][1][5])
    assert judged(gone)[0].p.value == pytest.approx(5, rel=0.06)


def test_figures_of_all_and_of_nothing(tmp_path):
    for planted in (BatchLaw(1.2e6, 5.0), BatchLaw(1e9, 5.0)):
        found, _ = judged(rows(planted))
        assert len(contours(found).axes) == 2 * 2 + 2  # with colour bars
        (panel,) = law(found).axes
        assert "paper: 1.21e+09 / L^6.24" in [line.get_label() for line in panel.lines]


# Trials.


def test_every_batch_sees_the_same_text_at_the_rate_of_its_power(config):
    for power, rates in ((0.0, (0.01, 0.01, 0.01)), (0.5, (0.005, 0.01, 0.02))):
        planned = batch_size.make_trials(config, Axis("width", (16, 32)), (1, 4, 16), power, 2)
        assert len(planned) == 2 * 3 * 2 == len({str(trial.labels) for trial in planned})
        for trial in planned:
            c, labels = trial.config, trial.labels
            assert (c.model.width, c.training.batch_size * 32) == (labels["width"], labels["batch"])
            assert c.batches.tokens(c.schedule.in_steps(c.batches).total) == 1024
            assert c.optimizer.learning_rate == labels["learning_rate"] and c.run.seed == labels["seed"]
        found = {trial.labels["batch"] // 32: trial.labels["learning_rate"] for trial in planned}
        assert list(found.values()) == pytest.approx(rates)


def test_the_papers_sizes_take_one_override():
    flags = ["batch-size", "--sizes=tunnel-9m,tunnel-30m,tunnel-0.17b", "--batches=16,32,64,128,256,512"]
    keys = ["--data.sequence_length=4096", "--schedule.warmup=100_000_000", "--schedule.length=9_900_000_000"]
    arguments, config = study.parse([*flags, *keys])
    axis, seeds = Axis("preset", tuple(arguments.sizes)), arguments.seeds
    planned = batch_size.make_trials(config, axis, arguments.batches, arguments.rate_power, seeds)
    assert len(planned) == 3 * 6 * 3 and {trial.config.model.width for trial in planned} == {320, 512, 896}
    assert {trial.labels["batch"] for trial in planned} == {2**power for power in range(16, 22)}
    assert {trial.labels["learning_rate"] for trial in planned} == {0.01}
    keys = ["--schedule.type=cosine", "--schedule.unit=tokens", "--schedule.warmup=16_384", "--schedule.length=245_760"]
    _, config = study.parse([*flags, *keys])
    assert batch_size.observed(config)[0] * 512 == 16_384 and config.schedule.in_steps(config.batches).total == 512


def test_points_are_in_equal_ratios_from_the_end_of_the_warmup(config):
    for rows_ in (1, 4):
        c = replace(config, training=replace(config.training, batch_size=rows_))
        tokens = [c.batches.tokens(step) for step in batch_size.observed(c)]
        assert tokens[0] == 128 and tokens[-1] == 1024 and tokens == sorted(set(tokens))
        ratios = np.diff(np.log(tokens))
        assert ratios.max() < np.log(8) / 24 + 2 * rows_ * 32 / 128


def test_without_held_out_text_there_is_nothing_to_judge_by(config):
    config = replace(config, data=replace(config.data, held_out=0.0))
    (trial,) = batch_size.make_trials(config, Axis("width", (16,)), (2,), 0.0, 1)
    with tunnel_jobs.workbench(config) as bench, pytest.raises(UserError, match="held_out = 0"):
        batch_size.measure(bench, trial)


# The command.

FLAGS = ["--widths=16,32", "--batches=1,2,4", "--seeds=1"]


@pytest.mark.slow
def test_the_command_measures_goes_on_and_repeats_nothing(folder, tmp_path):
    file = tunnel_jobs.experiment(folder)
    keys = [f"--schedule.{key}={value}" for key, value in SCHEDULE.items()]
    code, said = run("batch-size", file, *keys, f"--run.directory={tmp_path}", *FLAGS)
    assert code == 1 and said.splitlines()[-1].startswith("verdict: FAIL: ")  # one seed has no interval
    assert {"trials.csv", "trials.jsonl", "study.json", "contours.png", "law.png"} <= set(
        map(lambda p: p.name, tmp_path.iterdir())
    )
    before, ledger = read_csv(tmp_path / "trials.csv"), (tmp_path / "trials.jsonl").read_bytes()
    runs = {row["batch"]: [each for each in before if each["batch"] == row["batch"]] for row in before}
    assert sorted(runs) == [32, 64, 128] and {row["width"] for row in before} == {16, 32}
    for batch, found in runs.items():
        assert all(row["tokens"] == batch * row["step"] for row in found)
        narrow = [row for row in found if row["width"] == 16]
        assert narrow[-1]["heldout_loss"] < narrow[0]["heldout_loss"] < np.log(320) + 0.5
        noisy = [row for row in narrow if "gradient_signal" in row]
        assert len(noisy) == (len(narrow) - 1) // batch_size.NOISE_EVERY >= 1
        assert all(row["gradient_noise"] > 0 and 16 < row["gradient_tokens"] <= 32 for row in noisy)
    code, said = run("batch-size", file, *keys, f"--run.directory={tmp_path}", *FLAGS[:2], "--seeds=2")
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(ledger) and "jackknife over 2 seeds" in said
    assert len(Lines.read(tmp_path / "trials.jsonl")) == 12
    after = [row for row in read_csv(tmp_path / "trials.csv") if row["seed"] == 0]
    assert without_clock(after) == without_clock(before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batches=1,2"], "--batches = 1,2: expected at least three"),
        (["--batches=0,1,2"], "expected at least three positive"),
        (["--batches=1,2,2"], "each once"),
        (["--batches="], "--batches = : expected"),
        (["--rate-power=2"], "expected a number from 0 to 1, got '2'"),
        (["--rate-power=half"], "'half'"),
        (["--widths=64"], "--widths = 64: expected at least two"),
        (["--widths=32,64", "--sizes=tunnel-9m,tunnel-30m"], "--widths, --sizes: expected one of them"),
        (["--schedule.unit=steps"], "schedule.unit = steps: expected tokens"),
    ],
)
def test_bad_input_is_one_line_that_names_it(arguments, message, folder, tmp_path):
    file = Path(tunnel_jobs.experiment(folder))
    keys = [f"--schedule.{key}={value}" for key, value in SCHEDULE.items()]
    code, said = run("batch-size", file, *keys, f"--run.directory={tmp_path / 'study'}", "--widths=16,32", *arguments)
    assert code == 2 and message in said, said
    assert not (tmp_path / "study" / "trials.jsonl").exists()
