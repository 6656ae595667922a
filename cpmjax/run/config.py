"""Every section and key of an experiment: frozen dataclasses with their defaults.

A YAML file is this tree of sections; `--section.key=value` replaces one key (`cpmjax.run.cli`). Lengths count
steps unless said otherwise; a row is one packed sequence of `data.sequence_length` tokens; a batch is counted in rows.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cpmjax.run.batch_sizes import BatchSizes
from cpmjax.run.errors import UserError
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, ScheduleFree
from cpmjax.run.schedule import WSD, Schedule
from cpmjax.run.sources import CorpusConfig


@dataclass(frozen=True)
class RunConfig:
    directory: str = "runs/run"  # the run directory itself
    seed: int = 0  # initialisation, shuffling and sampling all derive from it
    cache: str = "~/.cache/cpmjax"  # tokenised corpora and compiled programs, shared by all runs
    accept_changes: tuple[str, ...] = ()  # keys that a resumed run may find changed; a section accepts all its keys

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.directory:
            yield "directory", "a folder"
        if not 0 <= self.seed < 2**32:
            yield "seed", "a whole number from 0 to below 2^32"


@dataclass(frozen=True)
class BranchConfig:
    run: str | None = None  # the parent's run directory; None starts from scratch
    step: int | None = None  # the parent's checkpoint to start from
    rewarmup: int | None = None  # steps of linear re-warmup; None: 0 with the parent's moments, 100 without them

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.run is None and self.step is not None:
            yield "run", f"the run directory whose step {self.step} to start from"
        if self.rewarmup is not None and self.rewarmup < 0:
            yield "rewarmup", "0 or more"


Parametrisation = Literal["minicpm", "minicpm_table7", "standard", "depth_mup", "completep"]


@dataclass(frozen=True)
class ModelConfig:
    """What a MiniCPM is (config.json of the release). Defaults of the three muP scalars are the released ones."""

    preset: str | None = None  # a name from cpmjax.model.presets; the keys below then override it one by one
    vocabulary: int = 4096
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_width: int | None = None  # None: width / heads
    feed_forward: int = 320
    context: int = 4096  # max_position_embeddings: where dynamic NTK begins to stretch
    tied: bool = True  # the head is the embedding
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Literal["none", "linear", "dynamic"] = "none"
    rope_factor: float = 1.0
    scale_emb: float = 12.0  # embeddings are multiplied by it
    scale_depth: float = 1.4  # every residual branch is multiplied by scale_depth / sqrt(layers)
    dim_model_base: int = 256  # muP base width: m = width / dim_model_base
    layers_base: int = 8  # base depth of the depth rules: n = layers / layers_base; MiniCPM's constants were found at 8
    init_std: float = 0.1  # initial scale at the base width
    parametrisation: Parametrisation = "minicpm"

    @property
    def kv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head(self) -> int:
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def width_multiplier(self) -> float:
        """m of muP: how many times wider than the base model."""
        return self.width / self.dim_model_base

    @property
    def depth_multiplier(self) -> float:
        """n of the depth rules: how many times deeper than the base model."""
        return self.layers / self.layers_base

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in (
            "vocabulary",
            "width",
            "layers",
            "heads",
            "feed_forward",
            "context",
            "dim_model_base",
            "layers_base",
        ):
            if getattr(self, key) < 1:
                yield key, "a positive whole number"
        for key in ("norm_epsilon", "rope_theta", "scale_emb", "scale_depth", "init_std"):
            if not getattr(self, key) > 0:
                yield key, "a positive number"
        if self.heads > 0 and (self.kv < 1 or self.heads % self.kv):
            yield "kv_heads", f"a divisor of model.heads = {self.heads}"
        if self.head_width is None and self.heads > 0 and self.width % self.heads:
            yield "width", f"a multiple of model.heads = {self.heads}, or model.head_width given"
        if self.heads > 0 and (self.head < 2 or self.head % 2):
            yield "head_width", "an even number (rotary embeddings turn pairs)"
        if self.rope_factor < 1:
            yield "rope_factor", "1 or more"


Attention = Literal["auto", "plain", "chunked", "cudnn", "triton", "splash"]


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes what the model is."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters, softmax and loss stay in float32
    remat: Literal["none", "block", "dots"] = "dots"  # recompute in the backward pass: nothing, blocks, all but matmuls
    attention: Attention = "auto"  # by platform and mesh (cpmjax.model.dispatch); splash: TPU; cudnn, triton: GPU
    unroll: int = 1  # layers per iteration of the scan over layers; with all of them remat saves nothing on a CPU
    loss_chunk: int = 1024  # tokens whose logits exist at one time

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("unroll", "loss_chunk"):
            if getattr(self, key) < 1:
                yield key, "a positive whole number"


@dataclass(frozen=True)
class TokenizerConfig:
    path: str | None = None  # a sentencepiece .model; None trains one with model.vocabulary pieces on stable corpora
    sample_bytes: int = 4_000_000  # how much text the training of a tokenizer reads

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.sample_bytes < 1:
            yield "sample_bytes", "a positive whole number"


@dataclass(frozen=True)
class DataConfig:
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    folder: str = ""  # a folder or URL where relative paths of corpora start; "": the working directory
    stable: dict[str, float] = field(default_factory=dict)  # corpus -> weight in rows, 0: only evaluated; all but decay
    decay: dict[str, float] = field(default_factory=dict)  # the same in the decay stage; empty: as stable
    sequence_length: int = 256
    held_out: float = 0.02  # share of documents never trained on, chosen by a hash of their names
    bad_documents: Literal["refuse", "skip"] = "refuse"  # skip: leave them out, and count them
    tokenizer: TokenizerConfig = TokenizerConfig()

    def weights(self, stage: str) -> dict[str, float]:
        """Corpus -> weight of those that a stage trains on."""
        weights = self.decay if stage == "decay" and self.decay else self.stable
        return {name: weight for name, weight in weights.items() if weight}

    def problems(self) -> Iterator[tuple[str, str]]:
        # Weights that were imported have no corpora: `cpmjax.run.cli.load` asks an experiment for one.
        for stage in ("stable", "decay") if self.corpora else ():
            if not self.weights(stage):
                yield stage, "a positive weight of at least one corpus"
        for stage in ("stable", "decay"):
            for name, weight in getattr(self, stage).items():
                if name not in self.corpora:
                    yield f"{stage}.{name}", f"one of data.corpora: {', '.join(self.corpora)}"
                elif not 0 <= weight < math.inf:
                    yield f"{stage}.{name}", "a positive weight, or 0 for a corpus that is only evaluated"
        names: dict[str, str] = {}  # by what says which documents there are
        for name, corpus in self.corpora.items():
            if getattr(corpus, "path", None) == "":
                yield f"corpora.{name}.path", "a file or folder"
            elif getattr(corpus, "name", None) == "":
                yield f"corpora.{name}.name", "a dataset of Hugging Face, or a folder of one"
            # Its documents would be read twice as often as their weights and the printed epochs say.
            elif names.setdefault(repr(corpus), name) != name:
                yield f"corpora.{name}", f"another corpus than data.corpora.{names[repr(corpus)]}, which is the same"
        if self.sequence_length < 2:
            yield "sequence_length", "2 or more"
        if not 0 <= self.held_out < 1:
            yield "held_out", "a share from 0 to below 1"


@dataclass(frozen=True)
class TrainingConfig:
    batch_size: int = 16  # rows a step, over all devices
    batch_warmup: tuple[tuple[int, int], ...] = ()  # before batch_size: [rows a step, length in schedule.unit], ...
    accumulation: int = 1  # micro-batches a step of batch_size rows; the gradient is that of the whole batch
    z_loss: float = 0.0  # weight of logsumexp(logits)^2 in the trained loss; the reported loss is without it
    ema: float | None = None  # what each update leaves of the average of parameters; null: no average is kept
    skip_nonfinite: int = 0  # how many steps with a NaN or infinite loss may be skipped before the run stops

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.batch_size < 1:
            yield "batch_size", "a positive whole number"
        elif self.accumulation < 1 or self.batch_size % self.accumulation:
            yield "accumulation", f"a divisor of training.batch_size = {self.batch_size}"
        elif any(min(stage) < 1 for stage in self.batch_warmup):
            yield "batch_warmup", "[rows a step, length] of each stage, both positive whole numbers"
        else:
            for rows, _ in self.batch_warmup:
                if rows % (parts := self.micro_batches(rows)):
                    most = self.batch_size // self.accumulation
                    yield (
                        "batch_warmup",
                        f"not {rows} but a multiple of {parts}, its micro-batches of at most {most} rows",
                    )
        if self.ema is not None and not 0 < self.ema < 1:
            yield "ema", "a share between 0 and 1, or null"
        if self.z_loss < 0:
            yield "z_loss", "0 or more"
        if self.skip_nonfinite < 0:
            yield "skip_nonfinite", "0 or more"

    def micro_batches(self, rows: int) -> int:
        """Of a step of so many rows: as few as have no more rows each than those of a step of batch_size."""
        return -(-rows * self.accumulation // self.batch_size)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1: whatever is left."""

    data: int = -1  # rows of the batch; parameters copied
    fsdp: int = 1  # rows of the batch; parameters split
    tensor: int = 1  # heads and feed-forward split
    sequence: int = 1  # positions split

    def problems(self) -> Iterator[tuple[str, str]]:
        for key, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                yield key, "a positive whole number, or -1 for whatever is left"
        if list(dataclasses.asdict(self).values()).count(-1) > 1:
            yield "data", "at most one axis of the mesh at -1"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, and where. The last step is always saved, and the last one before a decay."""

    folder: str | None = None  # of this run alone, absolute or gs:// or s3://; None: in the run directory
    every: int = 100
    every_in_decay: int | None = None  # None: as `every`
    steps: tuple[int, ...] = ()  # chosen steps to save as well; always kept
    keep_last: int | None = None  # None keeps every checkpoint
    keep_every: int | None = None  # beside the last ones: steps divisible by it

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.folder is not None and not self.folder.startswith(("/", "gs://", "s3://")):
            yield "folder", "an absolute path, or a URL that begins with gs:// or s3://"
        for key in ("every", "every_in_decay", "keep_last", "keep_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield key, "a positive whole number"


@dataclass(frozen=True)
class EvaluationConfig:
    every: int = 100
    rows: int = 64  # held-out rows of each corpus
    prompts: tuple[str, ...] = ()  # text to continue; the samples go to samples.jsonl
    sample_tokens: int = 64
    temperature: float = 0.0  # 0 is greedy

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("every", "rows", "sample_tokens"):
            if getattr(self, key) < 1:
                yield key, "a positive whole number"
        if self.temperature < 0:
            yield "temperature", "0 (greedy) or more"


@dataclass(frozen=True)
class LogConfig:
    every: int = 1
    tensorboard: bool = True
    wandb: str | None = None  # a wandb project; needs `pip install wandb`
    profile_steps: str | None = None  # FIRST:LAST, both included: a trace of these steps in profile/; may change

    @property
    def profiled(self) -> range:
        """The steps of profile_steps; empty without."""
        if self.profile_steps is None:
            return range(0)
        first, last = map(int, self.profile_steps.split(":"))
        return range(first, last + 1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.every < 1:
            yield "every", "a positive whole number"
        if self.profile_steps is not None:
            form = re.fullmatch("[0-9]{1,15}:[0-9]{1,15}", self.profile_steps)
            if form is None or not self.profiled or self.profiled[0] < 1:
                yield (
                    "profile_steps",
                    "FIRST:LAST, the first and the last step to trace, as in 10:13; steps count from 1",
                )


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    run: RunConfig = RunConfig()
    branch: BranchConfig = BranchConfig()
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    schedule: Schedule = field(default_factory=WSD)
    optimizer: OptimizerConfig = AdamW()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()

    @property
    def batches(self) -> BatchSizes:
        training = self.training
        return BatchSizes.counted(
            training.batch_size, self.data.sequence_length, training.batch_warmup, self.schedule.unit
        )

    def of_batch(self, rows: int) -> Config:
        """The same experiment with so many rows in every step: what a step of that size is compiled for."""
        training, accumulation = self.training, self.training.micro_batches(rows)
        training = dataclasses.replace(training, batch_size=rows, accumulation=accumulation, batch_warmup=())
        return dataclasses.replace(self, training=training)

    def branched(self, schedule: WSD, step: int) -> Config:
        """With this schedule, its decay right after `step`; what counted schedule.unit counts steps then."""
        batches = self.batches
        if schedule.unit == "tokens":  # the decay keeps its tokens, whatever the batches are there
            schedule = dataclasses.replace(schedule, stable=batches.tokens(step) - schedule.warmup)
        training = dataclasses.replace(self.training, batch_warmup=batches.warmup)
        return dataclasses.replace(self, training=training, schedule=schedule.in_steps(batches).branch(step))

    def problems(self) -> Iterator[tuple[str, str]]:
        allowed, kind = _CHECKED[type(self.optimizer)], OptimizerConfig.get_choice_name(type(self.optimizer))
        if self.training.ema is not None and isinstance(self.optimizer, ScheduleFree):
            yield "training.ema", "null with optimizer.type=schedule_free, which has an average of its own"
        if self.model.parametrisation not in allowed:
            yield "model.parametrisation", f"one of {', '.join(allowed)} with optimizer.type={kind}"
        batches, total = self.batches, self.schedule.in_steps(self.batches).total
        # A branch from before the end of its parent's warm-up may well end before it does.
        if self.training.batch_warmup and self.branch.run is None and batches.warmup_steps >= total:
            yield "training.batch_warmup", f"an end before step {total}, the last, got step {batches.warmup_steps}"
        if self.log.profiled and self.log.profiled[-1] > total:
            yield "log.profile_steps", f"steps up to {total}, the last"


# What has passed the coordinate check with each optimizer at its default rate (`python -m cpmjax.study
# coordinate-check`; a test repeats it). Beside it `standard`, which claims nothing, and, for the optimizer that it is
# about, Table 7 as printed, to compare with.
_CHECKED: dict[type[OptimizerConfig], tuple[str, ...]] = {
    AdamW: typing.get_args(Parametrisation),
    Lion: ("minicpm", "standard"),
    Adafactor: ("minicpm", "standard"),
    Muon: ("minicpm", "standard"),
    ScheduleFree: ("minicpm", "standard"),
}


def validate(config: Config) -> None:
    """Raises UserError for the first impossible value: its key, the value, and what is allowed."""
    _validate_section("", config)


def _validate_section(prefix: str, section: Any) -> None:
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            _validate_section(f"{prefix}{item.name}.", value)
    for key, allowed in section.problems() if hasattr(section, "problems") else ():
        raise UserError(f"{prefix}{key} = {_value_of(section, key)!r}: expected {allowed}")


def _value_of(section: Any, key: str) -> Any:
    """What a key of a section holds; a name in a mapping, a corpus's, may have dots of its own."""
    if isinstance(section, dict):
        name = max((name for name in section if f"{key}.".startswith(f"{name}.")), key=len)
        value = section[name]
    else:
        name = key.partition(".")[0]
        value = getattr(section, name)
    rest = key[len(name) + 1 :]
    return _value_of(value, rest) if rest else value
