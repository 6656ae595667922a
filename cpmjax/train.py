"""Pre-train a MiniCPM: from text to a decayed model.

usage: python -m cpmjax.train EXPERIMENT.yaml [--section.key=value ...]

A run directory that exists already is continued from its newest checkpoint. With --branch.run=RUN --branch.step=N
(or a YAML that says so) the run starts from step N of another one, with its settings, moments and place in the data,
and its decay begins there. Once training has begun, SIGTERM or Ctrl-C saves a checkpoint and exits with code 75: the
same command goes on.

On several hosts the same command runs on each, with the run directory on a disk that all of them share: SLURM and TPU
slices say who they are, elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import jax

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.data.loader import Loader
from cpmjax.data.text import Text, make_mixture, make_tokenizer, open_stores, segments
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model import mup
from cpmjax.model.parameters import count
from cpmjax.model.presets import PRESETS
from cpmjax.parallel import compiled, costs, distributed
from cpmjax.parallel.mesh import make_mesh
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.identity import encode
from cpmjax.run.interrupt import SAVED_AND_STOPPED
from cpmjax.sampling.prompts import Prompts
from cpmjax.training.evaluation import HeldOut
from cpmjax.training.log import Log, NoLog
from cpmjax.training.metrics import Throughput
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.origin import Origin, new_origin, starting_state
from cpmjax.training.padding import at_rest
from cpmjax.training.profile import Profile
from cpmjax.training.program import declared_state, lower_step
from cpmjax.training.recorder import Recorder
from cpmjax.training.report import draw_curves, last_screen
from cpmjax.training.state import averaged_parameters
from cpmjax.training.step import batch_sharding
from cpmjax.training.timeline import Timeline

_SECONDS_BETWEEN_PLOTS = 20.0


def main(argv: list[str]) -> int:
    config = cli.load(argv, PRESETS, __doc__ or "")
    directory = RunDirectory(config.run.directory)
    with distributed.joined(), directory.lock() if distributed.is_first() else contextlib.nullcontext():
        distributed.check_same(encode(config))
        return train(config, directory)


def train(config: Config, directory: RunDirectory) -> int:
    """Runs the experiment in its directory to its end, or until it is asked to stop; returns the exit code."""
    began = time.perf_counter()
    cache = Path(config.run.cache).expanduser()
    compiled.keep_compiled(cache)

    # ---- a run to continue, or a new one -------------------------------------------------------------------------
    found = distributed.first(lambda: _resumed(config, directory))
    resumes = found is not None
    origin = Origin.read(found) if found is not None else new_origin(config)
    timeline = Timeline(config, origin)

    # ---- text ----------------------------------------------------------------------------------------------------
    with distributed.first_ahead():
        tokenizer = _tokenizer(config, directory, origin, resumes)
        stores = open_stores(config, tokenizer, _say, origin.provenance.get("stores", {}))
    keys = {name: store.key for name, store in stores.items()}
    distributed.check_same({"text": keys})
    provenance = origin.provenance | {"stores": keys}
    order = segments(timeline.schedule, config.data, config.batches, origin.step, origin.position)
    text = Text(config, stores, make_mixture(config, stores, order, timeline.position(timeline.total)))

    # ---- model, optimizer, step ----------------------------------------------------------------------------------
    mesh = make_mesh(config.mesh)
    by_row = batch_sharding(mesh, config)
    throughput = Throughput(config, began)
    optimizer = make_optimizer(config.model, config.optimizer)
    _say(mup.describe(config.model, config.optimizer))
    _say(f"{count(config.model):,} parameters, {count(config.model, embeddings=False):,} of them not embeddings")
    _say(text.describe(origin.position, timeline.stage_ends()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        abstract = declared_state(config, optimizer, mesh)
        programs: dict[int, jax.stages.Compiled] = {}
        for rows in timeline.batch_sizes():  # one program each: what it takes is known before the first step
            compile_began = time.perf_counter()
            programs[rows] = lower_step(config.of_batch(rows), optimizer, abstract, by_row).compile()
            took = f"compiled in {time.perf_counter() - compile_began:.1f} s"
            _say(f"{rows} rows a step: {took} for {mesh.size} x {mesh.devices.flat[0]}")
            _say(compiled.describe(compiled.memory(programs[rows]), compiled.device_memory(jax.local_devices()[0])))
            _say(costs.describe(programs[rows], mesh))

        # ---- where it stands: nothing was written to the run before all of the above had worked ------------------
        first = distributed.is_first()  # others read what it writes, and are silent
        if first and not resumes:
            tokenizer.save(directory.path)
            directory.create(config, provenance)
        elif first and "stores" not in origin.provenance:  # an older run, or one whose data section was changed
            directory.write_provenance(provenance)
        distributed.follow_first()
        if not directory.exists:
            raise UserError(f"{directory.path} of process 0 is not there; expected a folder that all hosts share")
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(directory.checkpoints, config.checkpoint)))
        distributed.check_same({"checkpoints": checkpoints.steps()})
        start, state = starting_state(config, origin, checkpoints, optimizer, abstract)
        if start >= timeline.total:
            _say(f"{directory.path} is complete: step {start} of {timeline.total}")
            if first:
                draw_curves(directory, timeline)
                _say(last_screen(directory, timeline, checkpoints.steps()))
            return 0
        evaluate = HeldOut(config, text.held_out, tokenizer, by_row)
        prompts = Prompts(config, tokenizer, by_row)
        _say(throughput.formula)
        _say(
            f"{directory.path}: {origin}; step {start} of {timeline.total}, {time.perf_counter() - began:.1f} s so far"
        )

        def save(step: int) -> None:
            """After the lines of its step: a checkpoint that is there has all of them."""
            log.sync()
            position = {"sequences": timeline.position(step), "skipped": int(state.skipped)}
            if state.average is not None:
                position["averaged"] = int(state.average.updates)
            stored = at_rest(config.model, state)
            average = averaged_parameters(stored)
            checkpoints.save(step, stored.trainable, stored.optimizer, position, timeline.facts(step), average)

        # ---- the loop --------------------------------------------------------------------------------------------
        drawn = time.monotonic()
        with (
            contextlib.closing(Log(directory, config, start, timeline.total) if first else NoLog()) as log,
            distributed.AgreedStop() as stop,
            Loader(text.batches, timeline.batches(start), by_row) as loader,
            Profile(directory.profile, config.log.profiled if first else range(0), throughput) as profile,
        ):
            throughput.start(lambda: loader.waited)
            recorder = Recorder(log, timeline, throughput, start, int(state.skipped), checkpoints.newest)
            for step, batch in enumerate(loader, start + 1):
                profile.before(step, state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = programs[len(batch["tokens"])](state, batch, timeline.rates(step))
                profile.after(step, metrics)
                recorder.add(step, metrics)
                if timeline.evaluates(step):
                    jax.block_until_ready(metrics)
                    with throughput.paused("evaluation"):
                        losses = evaluate(state.trainable)
                        if (average := averaged_parameters(state)) is not None:
                            losses |= {f"average/{name}": value for name, value in evaluate(average).items()}
                    recorder.flush(losses)
                    with throughput.paused("evaluation"):
                        log.write_samples(prompts(at_rest(config.model, state.trainable), step))
                        if first and time.monotonic() - drawn > _SECONDS_BETWEEN_PLOTS:
                            draw_curves(directory, timeline)
                            drawn = time.monotonic()
                stopping = stop.granted()
                if timeline.saves(step) or stopping:
                    recorder.flush()  # what is left of the step is no saving
                    with throughput.paused("saving"):
                        save(step)
                if stopping:
                    break
            recorder.flush()
            with throughput.paused("saving"):
                checkpoints.wait()
            saved = checkpoints.steps()
            _say(throughput.summary(step - start, timeline.tokens(step) - timeline.tokens(start)))
        if first:
            draw_curves(directory, timeline)
    if step < timeline.total:
        _say(f"{stop.received}: saved step {step} of {timeline.total}; the same command goes on from there")
        return SAVED_AND_STOPPED
    if first:
        _say(last_screen(directory, timeline, saved))
    return 0


def _resumed(config: Config, directory: RunDirectory) -> dict[str, Any] | None:
    """The provenance of the run that is there, which now has this configuration; None if there is none."""
    if not directory.exists:
        return None
    for key, (old, new) in directory.check_resume(config).items():
        _say(f"changed: {key}: {old} -> {new}")
    return directory.provenance()


def _tokenizer(config: Config, directory: RunDirectory, origin: Origin, resumes: bool) -> Tokenizer:
    """The run's own, its parent's, or the one the configuration asks for."""
    if resumes:
        return Tokenizer.load(directory.tokenizer_file)
    if origin.parent is not None:
        return Tokenizer.load(origin.parent.tokenizer_file)
    return make_tokenizer(config, _say)


def _say(text: str) -> None:
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    distributed.main(main)
