"""What the trials of a study share: text, devices, and one compiled training step for each shape.

Learning rates, weight decays, seeds, initial scales and the multipliers of the forward pass enter the step as arrays,
so that a sweep over them, or over whole parametrisations, compiles once a shape. Trials run one after another: mapped
into one program they took 1.2 to 1.4 times as long (`python -m cpmjax.bench studies`, two CPU cores, 2026-11-24).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np

from cpmjax.data.loader import Loader
from cpmjax.data.text import Text, make_mixture, make_tokenizer, open_stores, segments
from cpmjax.model import mup
from cpmjax.model.parameters import Tree
from cpmjax.parallel.compiled import keep_compiled
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run.config import Config, ModelConfig, RunConfig
from cpmjax.run.identity import encode, fingerprint
from cpmjax.run.optimizers import OptimizerConfig
from cpmjax.run.schedule import Constant
from cpmjax.run.table import Row
from cpmjax.training.evaluation import HeldOut
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.origin import Origin
from cpmjax.training.padding import at_rest, padded
from cpmjax.training.state import TrainState, abstract_state, initial_state
from cpmjax.training.step import Batch, Rates, abstract_batch, batch_sharding, make_step, next_token_loss
from cpmjax.training.timeline import Timeline
from cpmjax.tunnel.states import States
from cpmjax.tunnel.trials import Diverged, Trial

_CHECKED_EVERY = 16  # steps; looking more often would make the device wait


class Moment(NamedTuple):
    """A trial after `step` updates. `parameters` are gone after the next update; who needs them longer copies."""

    step: int
    loss: float  # of the last update's batch; NaN before the first
    parameters: Tree
    scales: mup.Scales
    program: Program


class Program:
    """The compiled functions of one shape; `function` is the step before it was compiled."""

    def __init__(self, config: Config, workbench: Workbench) -> None:
        self.config = config
        mesh, model = workbench.mesh, config.model
        self.by_row = batch_sharding(mesh, config)
        self.evaluate = HeldOut(config, workbench.text(config).held_out, workbench.tokenizer, self.by_row)
        optimizer = make_optimizer(model, config.optimizer)
        self.abstract = abstract = abstract_state(model, optimizer, mesh, offload=config.optimizer.offload)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)

        def step(state: TrainState, batch: Batch, rates: Rates, scales: mup.Scales):
            loss = next_token_loss(model, config.compute, config.training.z_loss, scales.multipliers)
            optimizer = make_optimizer(model, config.optimizer, scales)
            return make_step(model, loss, optimizer, config.training.accumulation)(state, batch, rates)

        def begin(key: jax.Array, scales: mup.Scales) -> TrainState:
            return padded(initial_state(model, optimizer, key, scales), abstract)

        scales, rates = as_arrays(mup.scales(model, config.optimizer)), Rates(np.float32(0), np.float32(0))
        self.function = step
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self.step = jitted.lower(abstract, abstract_batch(config, self.by_row), rates, scales).compile()
        self.begin = jax.jit(begin, out_shardings=shardings).lower(jax.random.key(0), scales).compile()


class Workbench:
    """Opened in a `with`: inside, the mesh of the experiment is the one that is set."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        """Opens the text of the experiment, tokenising it where that was not done before."""
        keep_compiled(config.run.cache)
        self.mesh = make_mesh(config.mesh)
        self.tokenizer = make_tokenizer(config, say)
        self._stores = open_stores(config, self.tokenizer, say)
        self._texts: dict[str, Text] = {}
        self._programs: dict[str, Program] = {}
        self._states = States(config.run.directory)

    def __enter__(self) -> Workbench:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(jax.set_mesh(self.mesh))
        return self

    def __exit__(self, *_: object) -> None:
        self._states.close()
        self._stack.close()

    @cached_property
    def recipe(self) -> str:
        """Stands for the text and the versions that a result depends on."""
        parts = (self.tokenizer.fingerprint, sorted(store.key for store in self._stores.values()), jax.__version__)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def text(self, config: Config) -> Text:
        """The text in the order in which a trial of this experiment reads it."""
        timeline = Timeline(config, Origin({}))
        parts = (timeline.schedule.stages(), encode(config.data), config.batches, config.run.seed)
        if (key := repr(parts)) not in self._texts:
            order = segments(timeline.schedule, config.data, config.batches)
            mixture = make_mixture(config, self._stores, order, timeline.position(timeline.total))
            self._texts[key] = Text(config, self._stores, mixture)
        return self._texts[key]

    def program(self, config: Config) -> Program:
        """The program for the shape of an experiment, compiled when it is asked for the first time."""
        if (key := fingerprint(shape_of(config))) not in self._programs:
            self._programs[key] = Program(shape_of(config), self)
        return self._programs[key]

    def train(self, trial: Trial, steps: Iterable[int], observe: Callable[[Moment], Iterable[Row]]) -> list[Row]:
        """Trains a trial to its end; `observe` turns chosen moments (0 is the beginning) into rows of its results.

        A branch begins after its trunk's update `after`, and steps count from the beginning of the trunk. Raises
        Diverged, with the rows so far, at the first loss or gradient found to be not finite.
        """
        config, steps, rows = trial.config, frozenset(steps), list[Row]()
        program, scales = self.program(config.of_batch(config.training.batch_size)), scales_of(trial)

        def moment(step: int, loss: float, state: TrainState) -> Moment:
            return Moment(step, loss, at_rest(config.model, state.trainable), scales, program)

        begin = self._beginning(trial)
        if 0 in steps and trial.trunk is None:
            rows += observe(moment(0, float("nan"), begin))
        for step, state, loss in self._updates(trial, begin, trial.after, trial.total):
            if step in steps or step % _CHECKED_EVERY == 0 or step == trial.total:
                _check(state, step, rows)
            if step in steps:
                rows += observe(moment(step, float(loss), state))
        return rows

    def _beginning(self, trial: Trial) -> TrainState:
        if trial.trunk is not None:
            return self._state(trial.trunk, trial.after)
        program = self.program(trial.config.of_batch(trial.config.training.batch_size))
        return program.begin(jax.random.key(trial.config.run.seed), scales_of(trial))

    def _state(self, trial: Trial, step: int) -> TrainState:
        """After update `step` of a trial: as it was kept, or made again from the last one that was kept before it."""
        kept = self._states.of(trial.identity(self.recipe))
        program = self.program(trial.config.of_batch(trial.config.training.batch_size))
        if step not in kept.steps():
            before = max((each for each in kept.steps() if each < step), default=None)
            after = trial.after if before is None else before
            begin = self._beginning(trial) if before is None else kept.load(before, trial.config, program.abstract)
            for _ in self._updates(replace(trial, keep=(step,)), begin, after, step):
                pass
        return kept.load(step, trial.config, program.abstract)

    def _updates(
        self, trial: Trial, state: TrainState, after: int, until: int
    ) -> Iterator[tuple[int, TrainState, jax.Array]]:
        """(step, state, loss) of each update; a state is gone with the next one. Keeps those that the trial names."""
        config, scales = trial.config, scales_of(trial)
        timeline, text = Timeline(config, Origin({})), self.text(config)
        programs = {rows: self.program(config.of_batch(rows)) for rows in timeline.batch_sizes()}
        places = itertools.islice(timeline.batches(after), until - after)
        with Loader(text.batches, places, next(iter(programs.values())).by_row) as loader:
            for step, batch in enumerate(loader, after + 1):
                run_step = programs[len(batch["tokens"])].step
                state, metrics = run_step(state, batch, timeline.rates(step), scales)
                if step in trial.keep:
                    _check(state, step, [])
                    self._states.of(trial.identity(self.recipe)).save(step, config, state)
                yield step, state, metrics["loss"]


def _check(state: TrainState, step: int, rows: list[Row]) -> None:
    if int(state.skipped):
        raise Diverged(f"loss or gradient not finite by step {step}", rows)


def scales_of(trial: Trial) -> mup.Scales:
    return as_arrays(mup.scales(trial.config.model, trial.config.optimizer, trial.table))


def as_arrays(scales: mup.Scales) -> mup.Scales:
    return jax.tree.map(np.float32, scales)


def shape_of(config: Config) -> Config:
    """What is left of an experiment when all that enters a program as an array has its default value."""
    numbers = ("preset", "scale_emb", "scale_depth", "dim_model_base", "layers_base", "init_std", "parametrisation")
    defaults = {key: getattr(ModelConfig, key) for key in numbers}
    optimizer = {key: getattr(OptimizerConfig, key) for key in ("learning_rate", "weight_decay", "weight_decay_mode")}
    return replace(
        config,
        run=replace(RunConfig(), cache=config.run.cache),
        model=replace(config.model, **defaults),
        optimizer=replace(config.optimizer, **optimizer),
        schedule=Constant(),
    )
