"""Trials against the training job, and how often they compile."""

from __future__ import annotations

import shutil
import typing
from dataclasses import replace
from pathlib import Path

import jax
import jobs
import numpy as np
import pytest
import tunnel_jobs
from devices import on_eight_devices

from cpmjax.model import mup
from cpmjax.run.config import Config
from cpmjax.run.optimizers import UpdateSize
from cpmjax.run.schedule import WSD, WSDS
from cpmjax.tunnel import transfer
from cpmjax.tunnel.faults import FAULTS
from cpmjax.tunnel.sizes import Axis
from cpmjax.tunnel.trials import Diverged, Trial
from cpmjax.tunnel.workbench import shape_of

WIDTHS = Axis("width", (16, 32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jobs.shared_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def config(folder):
    return tunnel_jobs.config(folder)


def trials(config, names=("minicpm",), modes=("coupled",), rates=(0.01,), seeds=1, axis=WIDTHS):
    return transfer.make_trials(config, [axis], names, modes, rates, seeds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, mode, keys",
    [
        ("minicpm", "coupled", ()),
        ("standard", "independent", ("--training.batch_warmup=[[2,5]]",)),
        ("completep", "scaled", ()),
    ],
)
def test_a_trial_is_the_training_job(folder, name, mode, keys):
    """The same keys given to `python -m cpmjax.train` give the same losses, though there they are constants."""
    config, axis = tunnel_jobs.config(folder, *keys), Axis("layers", (3,))
    with tunnel_jobs.workbench(config) as bench:
        (trial,) = trials(config, [name], [mode], [0.03], axis=axis)
        trial = replace(trial, config=replace(trial.config, run=replace(trial.config.run, seed=5)))
        rows = transfer.measure(bench, trial)
    run = folder / f"trial-{name}"
    optimizer = trial.config.optimizer
    jobs.train(
        tunnel_jobs.experiment(folder),
        *keys,
        f"--run.directory={run}",
        "--run.seed=5",
        "--model.layers=3",
        f"--model.parametrisation={name}",
        "--optimizer.learning_rate=0.03",
        f"--optimizer.weight_decay_mode={mode}",
        f"--optimizer.weight_decay={optimizer.weight_decay}",
    )
    records = {record["step"]: record for record in jobs.records(run)}
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        for key in ("loss", "heldout_loss", "heldout_bits_per_byte"):
            assert row[key] == pytest.approx(records[row["step"]][key], abs=1e-5), key


@pytest.mark.smoke
def test_a_sweep_compiles_once_a_shape(config):
    """Rates, seeds, modes of the decay, initial scales, parametrisations and faults are arrays of one program."""
    swept = trials(config, ["minicpm", "standard", "no_logit_scale"], ["coupled", "independent"], [0.01, 0.02], 2)
    assert len(swept) == 48
    scaled = replace(swept[0].config.model, init_std=0.05, scale_emb=1.0, scale_depth=0.3)
    swept.append(replace(swept[0], config=replace(swept[0].config, model=scaled)))
    with tunnel_jobs.workbench(config) as bench:
        for trial in trials(config):
            transfer.measure(bench, trial)
        with tunnel_jobs.counted_compilations() as names:
            rows = [transfer.measure(bench, trial) for trial in swept]
        assert names == []
        with tunnel_jobs.counted_compilations() as names:
            transfer.measure(bench, trials(config, axis=Axis("width", (48,)))[0])
        assert {"jit(step)", "jit(begin)", "jit(evaluate)"} <= set(names) and len(names) == len(set(names))
    finals = [each[-1]["heldout_loss"] for each in rows]
    assert len(set(finals)) > len(finals) / 2 and np.isfinite(finals).all()


def test_trials_do_not_depend_on_what_ran_before(config):
    first, *others = trials(config, rates=[0.01, 0.3], seeds=2)
    with tunnel_jobs.workbench(config) as bench:
        before = transfer.measure(bench, first)
        for trial in others:
            transfer.measure(bench, trial)
        assert transfer.measure(bench, first) == before
    with tunnel_jobs.workbench(config) as bench:
        assert transfer.measure(bench, first) == before


def test_a_rate_without_measure_diverges_with_the_rows_so_far(config):
    # Large enough that the weights leave float32 after the first evaluation.
    (trial, *_) = trials(config, rates=[1e37])
    with tunnel_jobs.workbench(config) as bench, pytest.raises(Diverged, match="not finite by step"):
        transfer.measure(bench, trial)


def test_the_recipe_stands_for_text_and_tokenizer(config, folder):
    with tunnel_jobs.workbench(config) as bench, tunnel_jobs.workbench(config) as again:
        assert bench.recipe == again.recipe
    other = replace(config, data=replace(config.data, held_out=0.2))
    with tunnel_jobs.workbench(other) as elsewhere:
        assert elsewhere.recipe != bench.recipe


def test_what_a_program_is_compiled_for_leaves_out_what_enters_as_an_array(config):
    one, other = trials(config, ["minicpm", "standard"], ["coupled"], [0.01], axis=Axis("width", (32,)))
    assert shape_of(one.config) == shape_of(other.config)
    wider = replace(one.config, model=replace(one.config.model, feed_forward=44))
    assert shape_of(wider) != shape_of(one.config)
    beta = replace(one.config, optimizer=replace(one.config.optimizer, beta1=0.5))
    assert shape_of(beta) != shape_of(one.config)


def test_every_fault_is_one_replaced_entry():
    minicpm = mup.PARAMETRISATIONS["minicpm"]
    for name, fault in FAULTS.items():
        changed = [key for key in vars(minicpm) if getattr(minicpm, key) != getattr(fault.table, key)]
        assert len(changed) == 1, name
        (entry,) = changed
        if isinstance(getattr(minicpm, entry), mup.Rule):
            before, after = getattr(minicpm, entry), getattr(fault.table, entry)
            # Of the powers of the rate an optimizer has one for each role, by the size of its updates.
            others = sum(vars(before)[key] != vars(after)[key] for key in ("init", "rate_depth", "epsilon", "constant"))
            for size in typing.get_args(UpdateSize):
                # The embedding of a spectral optimizer is the other's: it has updates of an entry.
                of_rate = before.width_power(size) != after.width_power(size)
                assert others + of_rate == 1 or (entry == "embedding" and size == "spectral"), (name, size)


def test_the_mesh_is_set_inside_only(config):
    with tunnel_jobs.workbench(config) as bench:
        assert jax.sharding.get_abstract_mesh().axis_names == bench.mesh.axis_names
    assert jax.sharding.get_abstract_mesh().empty


# Branches.


class Losses:
    """Held-out losses of a trial by step, all of them observed."""

    def __init__(self, bench) -> None:
        self.bench = bench

    def __call__(self, trial: Trial) -> dict[int, tuple[float, float]]:
        def observe(moment):
            return [{"step": moment.step, "loss": moment.loss} | held_out(moment)]

        rows = self.bench.train(trial, range(trial.total + 1), observe)
        return {row["step"]: (row["loss"], row["heldout_loss"]) for row in rows}


def held_out(moment):
    return moment.program.evaluate(moment.parameters, moment.scales.multipliers)


def with_schedule(trial: Trial, schedule, **others) -> Trial:
    return replace(trial, config=replace(trial.config, schedule=schedule), **others)


def make_family(config: Config, directory: Path) -> tuple[Config, Trial, dict[str, Trial]]:
    """A trunk of 12 updates at the peak, two decays that leave it, and one that leaves the first of them."""
    config = replace(config, run=replace(config.run, directory=str(directory)))
    (trunk,) = trials(config, rates=[0.02], axis=Axis("width", (32,)))
    trunk = with_schedule(trunk, WSD(2, 10, 0), keep=(5, 9))
    early = with_schedule(trunk, WSD(2, 3, 4), trunk=trunk, after=5, keep=(9,))
    late = with_schedule(trunk, WSD(2, 7, 3), trunk=trunk, after=9, keep=())
    again = with_schedule(trunk, WSDS(2, ((3, 4), (3, 2)), "exponential"), trunk=early, after=9, keep=())
    return config, trunk, {"early": early, "late": late, "again": again}


@pytest.fixture
def family(config, tmp_path):
    return make_family(config, tmp_path)


def check_branches_on_a_mesh(folder: str) -> None:
    """Runs in a process with eight simulated devices, which do not divide the vocabulary."""
    mesh = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--model.vocabulary=321")
    config, trunk, branches = make_family(tunnel_jobs.config(Path(folder), *mesh), Path(folder) / "on_a_mesh")
    with tunnel_jobs.workbench(config) as bench:
        losses, late = Losses(bench), branches["late"]
        losses(trunk)
        found, scratch = losses(late), losses(replace(late, trunk=None, after=0))
    assert found == {step: scratch[step] for step in (10, 11, 12)}


@pytest.mark.slow
def test_branches_on_a_mesh(folder):
    on_eight_devices(__file__, f"check_branches_on_a_mesh({str(folder)!r})")


def test_a_branch_is_the_run_that_had_its_schedule_from_the_beginning(family):
    config, trunk, branches = family
    with tunnel_jobs.workbench(config) as bench:
        losses = Losses(bench)
        whole = losses(trunk)
        assert sorted(whole) == list(range(13))
        for name, branch in branches.items():
            found, scratch = losses(branch), losses(replace(branch, trunk=None, after=0, keep=()))
            assert sorted(found) == list(range(branch.after + 1, branch.total + 1)), name
            assert found == {step: scratch[step] for step in found}, name  # bit by bit
            last = min(branch.total, 12)
            assert found[last] != whole[last], name
    assert sorted(path.name for path in (Path(config.run.directory) / "states").glob("*/*")) == ["5", "9", "9"]


def test_a_state_that_is_missing_is_made_again(family):
    config, trunk, branches = family
    with tunnel_jobs.workbench(config) as bench:
        losses = Losses(bench)
        losses(trunk)
        expected = {name: losses(branch) for name, branch in branches.items()}
    (states,) = {path.parent for path in (Path(config.run.directory) / "states").glob("*/5")}
    shutil.rmtree(states / "9")  # the one at 5 is still there to go on from
    with tunnel_jobs.workbench(config) as bench:
        assert Losses(bench)(branches["late"]) == expected["late"]
    shutil.rmtree(states.parent)  # of `again` two trunks are missing, one below the other
    with tunnel_jobs.workbench(config) as bench:
        assert Losses(bench)(branches["again"]) == expected["again"]


def test_a_branch_is_another_trial_for_each_trunk_and_place(family):
    _, trunk, branches = family
    late = branches["late"]
    other = replace(trunk, config=replace(trunk.config, run=replace(trunk.config.run, seed=4)))
    different = [trunk, *branches.values(), replace(late, after=8), replace(late, trunk=other)]
    different.append(replace(late, trunk=None, after=0))
    assert len({each.identity("text") for each in different}) == len(different)
    assert replace(trunk, keep=()).identity("text") == trunk.identity("text")
    assert branches["late"].cost == pytest.approx(trunk.cost * 3 / 12)


def test_a_branch_of_what_diverged_has_diverged(family):
    config, trunk, branches = family
    trunk = replace(trunk, config=replace(trunk.config, optimizer=replace(trunk.config.optimizer, learning_rate=1e37)))
    branch = replace(branches["late"], trunk=trunk)
    with tunnel_jobs.workbench(config) as bench, pytest.raises(Diverged, match="not finite by step 9") as caught:
        Losses(bench)(branch)
    assert caught.value.rows == []
