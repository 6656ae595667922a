"""Weights in, weights out: any format that MiniCPM comes in to any other.

usage: python -m cpmjax.convert SOURCE TARGET --to run|hf|llama|gguf [--step N | --steps LIST|all]
                                [--average] [--dtype bf16|f16|f32] [--quant q8_0|q4_0]
                                [--mup SCALE_EMB,SCALE_DEPTH,DIM_MODEL_BASE] [--text-start prefix_space|plain]
                                [--section.key=value ...]
       python -m cpmjax.convert --inspect PATH

SOURCE is a run directory, a Hugging Face folder (MiniCPM or Llama), a folder of checkpoints like MiniCPM-2B-history,
a GGUF file, or hf://OWNER/REPO[@REVISION], of which one checkpoint at a time is downloaded, imported, verified and
deleted. It is recognised by its content. Of a run the newest checkpoint is taken, of a series that becomes a run all;
several steps that become hf, llama or gguf go to TARGET/STEP. With --average it is the average of parameters that a
run kept (training.ema, schedule-free AdamW). The same command goes on after a kill.

--mup gives the muP constants to a MiniCPM whose config lacks them (the release has 12,1.4,256), and takes them out of
the weights of a Llama that they were folded into. --section.key=value sets what an imported series cannot say itself:
its schedule, batch size, sequence length and learning rate. The exit code is 1 if part of a series was not converted.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

from cpmjax.data.tokenizer import TextStart
from cpmjax.formats.exporting import Quantisation, export_gguf, export_huggingface, export_llama
from cpmjax.formats.fold import Constants
from cpmjax.formats.history import Chronology
from cpmjax.formats.importing import Failure, import_run
from cpmjax.formats.inspecting import inspect
from cpmjax.formats.loading import Reading, Stored
from cpmjax.formats.sources import Candidate, Source, absent, open_source
from cpmjax.model.weights import DTYPES, cast
from cpmjax.run import cli
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import DiskFull, Unreachable, UserError

Target = Literal["run", "hf", "llama", "gguf"]
Dtype = Literal["bf16", "f16", "f32"]
_KEY = re.compile(r"--\w+(\.\w+)+=.*", re.DOTALL)


def main(argv: list[str]) -> int:
    arguments, keys = _parse(argv)
    if arguments.inspect:
        print(inspect(Path(arguments.source).expanduser()))
        return 0
    failures = convert(
        arguments.source,
        arguments.target,
        arguments.to,
        steps=arguments.steps if arguments.step is None else [arguments.step],
        average=arguments.average,
        dtype=arguments.dtype,
        quantisation=arguments.quant,
        constants=arguments.mup,
        text_start=arguments.text_start,
        keys=keys,
    )
    if failures:
        print("not converted, for the reasons above:", ", ".join(each.name for each in failures), file=sys.stderr)
    return 1 if failures else 0


def convert(
    source: str | Path,
    target: str | Path,
    to: Target,
    *,
    steps: Sequence[int] | Literal["all"] | None = None,
    average: bool = False,
    dtype: Dtype | None = None,
    quantisation: Quantisation | None = None,
    constants: Constants | None = None,
    text_start: TextStart | None = None,
    keys: Sequence[str] = (),
) -> list[Failure]:
    """What the job does; the parameters are its flags, `keys` its --section.key=value.

    Returns those of several checkpoints that could not be converted, and why; everything else that is wrong raises
    UserError.
    """
    target = Path(target).expanduser()
    if quantisation is not None and to != "gguf":
        raise UserError(f"--quant {quantisation}: expected --to gguf with it")
    if quantisation is not None and dtype is not None:
        raise UserError(f"--quant {quantisation} and --dtype {dtype}: expected one of them")
    if keys and to != "run":
        raise UserError(f"{keys[0]}: expected --to run with it")
    downloads = target.with_name(f".{target.name}.download")
    stored_as = None if dtype is None else DTYPES[dtype]
    # What a Llama is folded from is not rounded before.
    reading = Reading(constants, text_start, None if to == "llama" else stored_as, average)
    with open_source(str(source), downloads, reading) as opened:
        if average and not opened.of_a_run:
            raise UserError(f"--average: expected a run, got {opened.label}")
        chosen = _choose(opened, steps, to)
        if to == "run":
            return _to_run(opened, chosen, RunDirectory(target), keys)
        for model in chosen.values() if average else ():
            with model.open(lambda count: None):
                pass  # a checkpoint without one shows before the first is written
        failures = []
        for step, model in chosen.items():
            several = len(chosen) > 1
            place = target / (f"{step}.gguf" if to == "gguf" else str(step)) if several else target
            if several and place.exists():
                _say(f"{model.name} -> {place} is there already")
                continue
            try:
                with model.open(lambda count: None) as stored:
                    _say_all(stored.notes)
                    _export(stored, place, to, stored_as, quantisation)
                _say(f"{model.name} -> {place}")
            except UserError as error:
                if isinstance(error, DiskFull | Unreachable) or not several:
                    raise
                failures.append(Failure(model.name, str(error)))
                _say(f"{model.name}: NOT converted: {error}")
    return failures


def _choose(source: Source, steps: Sequence[int] | Literal["all"] | None, to: Target) -> dict[int | None, Candidate]:
    """The models that are asked for, by step; a step of a single model that becomes a run is the one it gets."""
    models = source.models
    if not source.series:
        (only,) = models.values()
        if steps == "all" or (steps is not None and (to != "run" or len(steps) != 1)):
            raise UserError(f"{source.label}: holds one model; expected no steps, or --to run and the --step it gets")
        return {None if steps is None else steps[0]: only}
    if steps == "all" or (steps is None and to == "run"):
        return models
    if steps is None and source.of_a_run:
        return dict([list(models.items())[-1]])
    listed = ", ".join(map(str, models))
    if steps is None:
        raise UserError(f"{source.label}: a series of checkpoints; expected --step, one of {listed}, or --steps all")
    missing = [step for step in steps if step not in models]
    if missing and (to != "run" or len(missing) == len(steps)):
        raise UserError(f"{source.label}: has no step {missing[0]}; expected one of {listed}")
    return {step: models.get(step) or absent(source.label, step) for step in steps}


def _to_run(
    source: Source,
    chosen: dict[int | None, Candidate],
    directory: RunDirectory,
    keys: Sequence[str],
) -> list[Failure]:
    if source.of_a_run:
        raise UserError(f"{source.label}: a run already; expected --to hf, llama or gguf")
    # A single model has a place in time if it was given a step.
    chronology = Chronology(source.label, tuple(keys), dated=source.series or None not in chosen)
    failures = import_run(directory, chronology, {step or 0: model for step, model in chosen.items()}, _say)
    if directory.exists:
        config = cli.decode(directory.read_config(), str(directory.config_file))
        _say_all(chronology.describe(config.model))
        _say(f"{directory.path}: {len(chosen) - len(failures)} of {len(chosen)} checkpoints imported")
    return failures


def _export(stored: Stored, place: Path, to: Target, dtype: np.dtype | None, quantisation: Quantisation | None) -> None:
    if to == "gguf":
        _say_all(export_gguf(stored, place, quantisation))
    elif to == "llama":
        export_llama(stored, place, dtype)
        if (types := cast(stored.weights, dtype).dtype_names()) != "f32":
            _say(f"the constants are folded into weights of {types}, which rounds them; --dtype f32 does not")
    else:
        export_huggingface(stored, place)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser.documented("python -m cpmjax.convert", __doc__)
    parser.add_argument("source", help="a path, or hf://OWNER/REPO[@REVISION]")
    parser.add_argument("target", nargs="?", help="a new place, or a run directory that this import began")
    parser.add_argument("--to", choices=get_args(Target))
    parser.add_argument("--step", type=int, help="one checkpoint; the number that a single model gets in its run")
    parser.add_argument("--steps", type=cli.step_list, help="numbers with commas between them, or all")
    parser.add_argument("--average", action="store_true", help="the average of a run's parameters, in their place")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of the weights (default: as they come)")
    parser.add_argument("--quant", choices=get_args(Quantisation), help="of the matrices of a GGUF file")
    parser.add_argument("--mup", type=_constants, help="SCALE_EMB,SCALE_DEPTH,DIM_MODEL_BASE")
    parser.add_argument(
        "--text-start",
        choices=get_args(TextStart),
        help="of a released tokenizer: prefix_space as AutoTokenizer (default), plain as sentencepiece",
    )
    parser.add_argument("--inspect", action="store_true", help="print what SOURCE is, and convert nothing")
    arguments, keys = parser.parse_known_args(argv)
    if arguments.step is not None and arguments.steps is not None:
        parser.error("--step and --steps are two answers to one question")
    for argument in keys:
        if not _KEY.fullmatch(argument):
            parser.error(f"unknown argument {argument}")
    if not arguments.inspect and (arguments.target is None or arguments.to is None):
        parser.error(f"{'TARGET' if arguments.target is None else '--to'} is missing")
    return arguments, keys


def _constants(text: str) -> Constants:
    try:
        scale_emb, scale_depth, base = text.split(",")
        known = Constants(float(scale_emb), float(scale_depth), int(base))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected three numbers, as in 12,1.4,256, got {text!r}") from error
    if not (0 < known.scale_emb < math.inf and 0 < known.scale_depth < math.inf and known.dim_model_base > 0):
        raise argparse.ArgumentTypeError(f"expected three positive numbers, got {text!r}")
    return known


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    cli.main(main)
