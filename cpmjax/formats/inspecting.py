"""What a file or folder of weights is, in words: format, model, muP scales, tokenizer, and every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.formats.fold import Constants, constants
from cpmjax.formats.gguf_files import GgufFile
from cpmjax.formats.history import find_steps
from cpmjax.formats.loading import Kind, Stored, files_below, open_stored, open_tensors, recognise, run_steps
from cpmjax.formats.tensors import Tensors
from cpmjax.model import mup
from cpmjax.model.parameters import count
from cpmjax.model.weights import Weights
from cpmjax.run.config import ModelConfig
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.table import aligned

_KINDS: dict[Kind, str] = {
    "run": "a run directory",
    "huggingface": "a Hugging Face folder",
    "history": "a series of checkpoints",
    "gguf": "a GGUF file",
    "safetensors": "a safetensors file",
    "torch": "a file of torch.save",
}
_RELEASED = Constants(12.0, 1.4, 256)
_AT_ONCE = 2**22  # numbers whose squares are added up together


def inspect(path: Path) -> str:
    """Says what a path holds; what keeps it from being a whole model is a line of it, not an error.

    Raises UserError for a path that holds no weights, or whose tensors cannot be listed.
    """
    kind = recognise(path)
    lines = [f"{path}: {_KINDS[kind]}"]
    step, at = None, path
    if kind == "run":
        step = run_steps(path)[-1]
        lines += _run(RunDirectory(path))
    elif kind == "history":
        steps = find_steps(files_below(path))
        step = next(iter(steps))
        at = path / steps[step]
        lines.append(f"steps      {', '.join(map(str, steps))}; what follows is step {step}")
    tensors = None if kind == "run" else open_tensors(at)
    try:
        stored = open_stored(path, step)
    except UserError as error:
        if tensors is None:
            raise
        lines.append(f"problem    {error}")
    else:
        types = stored.weights.dtype_names() if tensors is None else _types(tensors)
        lines += _model(stored, types)
    rows = _slices(stored.weights) if tensors is None else _tensors(tensors)
    if isinstance(tensors, GgufFile):
        lines += _metadata(tensors)
    return "\n".join([*lines, "", aligned([("tensor", "shape", "type", "norm"), *rows])])


def _run(directory: RunDirectory) -> Iterator[str]:
    provenance = directory.provenance()
    origin = f" of {provenance['source']}" if "source" in provenance else ""
    yield f"kind       {provenance['kind']}{origin}, {provenance['created']}"
    checkpoints = Checkpoints(directory.checkpoints)
    rows = [("checkpoint", "tokens", "stage", "learning rate")]
    for step in checkpoints.steps():
        facts = checkpoints.metadata(step)
        tokens, stage, rate = (facts.get(key) for key in ("tokens", "stage", "learning_rate"))
        known = ("unknown", "unknown") if tokens is None else (str(tokens), f"{rate:g}")
        rows.append((str(step), known[0], str(stage), known[1]))
    checkpoints.close()
    yield from aligned(rows).splitlines()


def _model(stored: Stored, types: str) -> Iterator[str]:
    config = stored.weights.config
    kind = "Llama" if config.parametrisation == "standard" else "MiniCPM"
    head = "tied" if config.tied else "of its own"
    scaling = "" if config.rope_scaling == "none" else f", {config.rope_scaling} scaling by {config.rope_factor:g}"
    yield (
        f"model      {kind}, {count(config):,} parameters in {types}: {config.layers} layers, width {config.width}, "
        f"{config.heads} heads of {config.head}, {config.kv} for keys and values, feed-forward {config.feed_forward}, "
        f"vocabulary {config.vocabulary}, head {head}"
    )
    yield f"context    {config.context} tokens, rotary base {config.rope_theta:g}{scaling}"
    yield from _mup(config)
    yield from (f"note       {note}" for note in stored.notes)
    yield f"tokenizer  {_tokenizer(stored.tokenizer)}"


def _mup(config: ModelConfig) -> Iterator[str]:
    forward = mup.multipliers(config)
    if all(multiplier == 1 for multiplier in forward):
        yield "muP        no scales: a Llama, or a MiniCPM whose scales are in its weights"
        return
    known = constants(config)
    released = "as released" if known == _RELEASED else f"the release has {_words(_RELEASED)}"
    yield (
        f"muP        {_words(known)} ({released}): embeddings x {forward.embedding:g}, branches x "
        f"{forward.residual:.4g}, hidden state before the head x {forward.logits:.4g}"
    )


def _words(known: Constants) -> str:
    return f"scale_emb {known.scale_emb:g}, scale_depth {known.scale_depth:g}, dim_model_base {known.dim_model_base}"


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none"
    start = "with a space in front" if tokenizer.text_start == "prefix_space" else "as it is"
    added = f", {', '.join(tokenizer.added_tokens)} added" if tokenizer.added_tokens else ""
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    return f"{tokenizer.vocabulary} tokens{added}, text starts {start} ({tokenizer.text_start}), {template}"


def _metadata(file: GgufFile) -> Iterator[str]:
    for key, value in file.metadata.items():
        if isinstance(value, list | np.ndarray):
            yield f"key        {key}: {len(value)} values"
        else:
            text = str(value).replace("\n", "\\n")
            yield f"key        {key} = {text if len(text) <= 80 else f'{text[:80]}...'}"


def _types(tensors: Tensors) -> str:
    return " and ".join(dict.fromkeys(info.stored for info in tensors.values()))


def _tensors(tensors: Tensors) -> Iterator[tuple[str, str, str, str]]:
    for name, info in tensors.items():
        yield name, _by(info.shape), info.stored, _norm([tensors.read(name)])


def _slices(weights: Weights) -> Iterator[tuple[str, str, str, str]]:
    for path, spec in weights.specs.items():
        layers = range(weights.config.layers) if path.startswith("layers/") else [None]
        arrays = (weights.read(path, layer) for layer in layers)
        yield path, _by(spec.shape), str(weights.dtypes[path]), _norm(arrays)


def _norm(arrays: Iterable[np.ndarray]) -> str:
    """Euclidean, over all of the arrays, summed in float64: the same digits on every machine; says so where a number is
    none."""
    total = 0.0
    for array in arrays:
        numbers = array.reshape(-1)
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE].astype(np.float64)
            total += float(np.dot(some, some))
    return f"{np.sqrt(total):.6g}" if np.isfinite(total) else f"{total} (not finite)"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if shape else "1"
