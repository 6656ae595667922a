"""The judgement of a transfer on made-up losses, whose optimum, regret and order are known."""

from __future__ import annotations

import math
from dataclasses import replace

import jobs
import numpy as np
import pytest
import tunnel_jobs
from tunnel_jobs import RATES, falling
from tunnel_jobs import made_up_losses as rows

from cpmjax.model import mup
from cpmjax.tunnel import transfer
from cpmjax.tunnel.sizes import Axis


def judged(table):
    (family,) = transfer.families(table)
    return family, {verdict.criterion.split(",")[0]: verdict for verdict in transfer.verdicts(family)}


def test_an_optimum_that_stays_passes():
    family, verdicts = judged(rows(lambda width: 0.01, falling))
    assert [family.rates[best] for best in family.best] == pytest.approx([0.01] * 4)
    assert family.optima == pytest.approx([0.01] * 4)
    assert family.regret == pytest.approx([0.0, 0.0]) and family.rise == pytest.approx(-0.1)
    assert len(verdicts) == 3 and all(verdict.passed for verdict in verdicts.values())


def test_an_optimum_between_two_points_is_found_between_them():
    family, _ = judged(rows(lambda width: 0.012, falling))
    assert family.optima == pytest.approx([0.012] * 4)


def test_an_optimum_that_moves_fails_with_its_regret():
    """Two octaves from 32 to 256: the narrow optimum costs the widest 0.1 * 2^2."""
    family, verdicts = judged(rows(lambda width: 0.01 * (32 / width) ** (2 / 3), falling))
    assert family.shift == 2 and family.end_shift == -2
    assert family.regret == pytest.approx([0.4, 0.4])
    assert not verdicts["the optimum stays"].passed and not verdicts["regret"].passed
    assert verdicts["regret"].measured.startswith("+0.4000")


def test_one_factor_of_two_passes_only_where_it_costs_little():
    moved = {32: 0.01, 64: 0.01, 128: 0.01, 256: 0.02}
    for bowl, passes in ((0.019, True), (0.021, False)):
        family, verdicts = judged(rows(moved.get, falling, bowl=bowl))
        assert family.shift == 1 and verdicts["the optimum stays"].passed
        assert verdicts["regret"].passed is passes


def test_the_way_between_counts_not_only_the_ends():
    there_and_back = {32: 0.01, 64: 0.04, 128: 0.01, 256: 0.01}
    family, verdicts = judged(rows(there_and_back.get, falling))
    assert family.end_shift == 0 and family.shift == 2 and not verdicts["the optimum stays"].passed


def test_an_optimum_at_the_edge_of_the_grid_proves_nothing():
    _, verdicts = judged(rows(lambda width: RATES[0] / 4, falling))
    assert not verdicts["the optimum stays"].passed
    assert "edge of the grid" in verdicts["the optimum stays"].measured


@pytest.mark.parametrize("rise, passes", [(0.009, True), (0.011, False)])
def test_a_wider_model_that_is_worse_is_seen_at_any_step(rise, passes):
    table = rows(lambda width: 0.01, falling)
    for row in table:
        if row["width"] == 128 and row["step"] == 100:
            row["heldout_loss"] += 0.1 + rise  # at 64 it is 0.1 more than at 128
    _, verdicts = judged(table)
    assert verdicts["wider is never worse"].passed is passes


def test_a_rate_that_diverges_is_no_optimum():
    broken = {(256, rate) for rate in RATES if rate > 0.005}
    family, verdicts = judged(rows(lambda width: 0.01, falling, diverged=broken))
    assert math.isinf(family.final[3, 4]) and family.rates[family.best[3]] == pytest.approx(0.005)
    assert not verdicts["regret"].passed and math.isinf(family.regret[0])


def test_the_control_must_move():
    for octaves, passes in ((1, False), (2, True), (3, True)):
        table = rows(lambda width, octaves=octaves: 0.01 * (32 / width) ** (octaves / 3), falling, name="standard")
        _, verdicts = judged(table)
        (verdict,) = verdicts.values()
        assert verdict.passed is passes and verdict.measured == f"-{octaves}"


def test_depth_is_not_asked_to_be_ordered():
    _, verdicts = judged(rows(lambda width: 0.01, lambda layers: 4 + layers, axis="layers"))
    assert set(verdicts) == {"the optimum stays", "regret"} and all(v.passed for v in verdicts.values())


def test_families_are_told_apart():
    table = rows(lambda width: 0.01, falling) + rows(lambda width: 0.02, falling, name="completep")
    table += [row | {"weight_decay": "scaled"} for row in rows(lambda width: 0.04, falling)]
    found = transfer.families(table)
    assert [(f.parametrisation, f.weight_decay, f.rates[f.best[0]]) for f in found] == [
        ("minicpm", "coupled", pytest.approx(0.01)),
        ("completep", "coupled", pytest.approx(0.02)),
        ("minicpm", "scaled", pytest.approx(0.04)),
    ]
    assert found[0].losses.shape == (2, 4, len(RATES), 2)


# Trials.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tunnel_jobs.config(jobs.shared_folder(tmp_path_factory), "--optimizer.learning_rate=0.02")


def test_a_grid_is_every_combination_once(config):
    axes = [Axis("width", (16, 32)), Axis("layers", (1, 2, 4))]
    planned = transfer.make_trials(config, axes, ["minicpm", "standard"], ["coupled", "scaled"], RATES, 3)
    assert len(planned) == 2 * 2 * 5 * len(RATES) * 3
    assert len({str(trial.labels) for trial in planned}) == len(planned)
    for trial in planned:
        labels, c = trial.labels, trial.config
        assert labels["learning_rate"] == c.optimizer.learning_rate and labels["seed"] == c.run.seed
        assert labels["weight_decay"] == c.optimizer.weight_decay_mode
        assert labels["parametrisation"] == c.model.parametrisation
        assert getattr(c.model, labels["axis"]) == labels[labels["axis"]]
        assert trial.table == mup.PARAMETRISATIONS[labels["parametrisation"]]


@pytest.mark.parametrize("own", ["coupled", "independent"])
def test_the_modes_of_the_decay_agree_at_the_base_size_and_the_experiments_own_rate(config, own):
    """What a matrix loses in one step of the stable stage, as a share of itself, whatever the experiment's own mode."""
    decay = 0.1 if own == "coupled" else 0.002
    optimizer = replace(config.optimizer, weight_decay_mode=own, weight_decay=decay)
    config = replace(config, optimizer=optimizer)
    removed = {}
    for mode in ("coupled", "scaled", "independent"):
        for rate in (0.02, 0.08):
            axis = Axis("width", (16, 64))
            for trial in transfer.make_trials(config, [axis], ["minicpm"], [mode], [rate], 1):
                scales = mup.scales(trial.config.model, trial.config.optimizer, trial.table)
                decay = scales.leaves["layers"]["gate"].decay * mup.per_step(trial.config.optimizer, 1.0)[1]
                removed[mode, rate, trial.config.model.width] = decay
    base = 0.002
    assert [removed[mode, 0.02, 16] for mode in ("coupled", "scaled", "independent")] == pytest.approx([base] * 3)
    assert removed["coupled", 0.08, 64] == pytest.approx(4 * base / 4)
    assert removed["scaled", 0.08, 64] == pytest.approx(4 * base)
    assert removed["independent", 0.08, 64] == pytest.approx(base)


def test_measured_rows_fall_and_belong_to_the_evaluations(config):
    (trial,) = transfer.make_trials(config, [Axis("width", (32,))], ["minicpm"], ["coupled"], [0.02], 1)
    with tunnel_jobs.workbench(config) as bench:
        found = transfer.measure(bench, trial)
    assert [row["step"] for row in found] == [4, 8, 12]
    losses = np.array([row["heldout_loss"] for row in found])
    assert (np.diff(losses) < 0).all() and losses[0] < np.log(320) + 0.5
