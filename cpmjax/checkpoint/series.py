"""A series of checkpoints: one line of descent, from the beginning of its trunk to the end of one branch.

What a study needs to know of each step, whoever wrote it: a run trained here, a branch together with the trunk it left,
or a published history that was imported, without optimizer state and perhaps without a schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.model.loss import mean_loss
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.model.weights import Weights
from cpmjax.run import cli
from cpmjax.run.config import ComputeConfig, Config
from cpmjax.run.directory import Lines, RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.identity import fingerprint
from cpmjax.run.schedule import Stage

TRUNK = "trunk"  # the run that a folder of runs stands for


class Series:
    """The checkpoints of a run, after those of its parents up to the step at which it left them.

    `path` is a run directory, or a folder of runs one of which is called trunk: that one. Nothing is read before it is
    asked for. A parent that is neither where it was nor beside the run is left out. Raises UserError for a path that is
    no run or has no checkpoint, and, from every method that takes a step, for a step that is not there or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).expanduser()
        if not RunDirectory(path).exists and RunDirectory(path / TRUNK).exists:
            path = path / TRUNK
        self.path, self.name = path, path.resolve().name
        self._run = RunDirectory(path)
        self.config: Config = cli.decode(self._run.read_config(), str(self._run.config_file))
        own = Checkpoints(self._run.checkpoints)
        self._stores: dict[int, Checkpoints] = {}
        self.parent = self._find_parent()
        if self.parent is not None:
            self._stores |= {step: self.parent._stores[step] for step in self.parent.steps if step <= self.branch_step}
        self._stores |= dict.fromkeys(own.steps(), own)
        if not self._stores:
            raise UserError(f"{path} has no checkpoint yet: expected a complete one in {self._run.checkpoints}")
        self._facts: dict[int, dict[str, Any]] = {}

    def __repr__(self) -> str:
        return f"Series({str(self.path)!r}): {len(self.steps)} checkpoints, steps {self.steps[0]} to {self.steps[-1]}"

    # What there is.

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending; those of the parents first."""
        return sorted(self._stores)

    @property
    def branch_step(self) -> int:
        """The parent's step at which this run left it; 0 of a run from scratch."""
        return self._run.provenance().get("parent", {}).get("step", 0)

    def branches(self) -> dict[str, Series]:
        """{name: Series} of the runs beside this one that left it, by name; a branch of a branch is the branch's."""
        found = {}
        for folder in sorted(self._run.path.resolve().parent.iterdir()):
            run = RunDirectory(folder)
            if not run.exists or not run.provenance_file.exists():
                continue
            parent = run.provenance().get("parent")
            if parent is not None and self._is(parent) and Checkpoints(run.checkpoints).steps():
                found[folder.name] = Series(folder)
        return found

    def decays(self) -> dict[str, Series]:
        """{name: Series} of this line, if it has a checkpoint in a decay, else of its branches that have one."""
        if any(self.stage(step) == "decay" for step in self.steps):
            return {self.name: self}
        lines = self.branches().items()
        return {name: line for name, line in lines if any(line.stage(step) == "decay" for step in line.steps)}

    def stable(self) -> list[int]:
        """The steps in the stable stage; of an import whose schedule nobody knows, all."""
        return [step for step in self.steps if self.stage(step) in ("stable", "imported")]

    # What is known of a step.

    def stage(self, step: int) -> str:
        """warmup, stable, decay, cosine; imported, where nobody knows."""
        return self._facts_of(step)["stage"]

    def learning_rate(self, step: int) -> float | None:
        """At the base width, of the update that made the checkpoint; None where nobody knows."""
        return self._facts_of(step)["learning_rate"]

    def tokens(self, step: int) -> int | None:
        """Tokens consumed; None where nobody knows."""
        return self._facts_of(step)["tokens"]

    def stages(self) -> list[Stage]:
        """The stages of its schedule, to shade a figure by; none where nobody knows."""
        if self.stage(self.steps[-1]) == "imported":
            return []
        return [*self.config.schedule.in_steps(self.config.batches).stages()]

    def log(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl along the line of descent, ascending by step; empty for an import."""
        before = [] if self.parent is None else self.parent.log()
        own = Lines.read(self._run.metrics_file) if self._run.metrics_file.exists() else []
        return [record for record in before if record["step"] <= self.branch_step] + own

    # What it holds.

    def parameters(self, step: int) -> Tree:
        """The nested dict of parameters as they are stored, on the default device; layers are stacked."""
        return self._store(step).parameters(step)

    def weights(self, step: int) -> Weights:
        """The same, read one slice (a layer of a stacked parameter) at a time."""
        return self._store(step).weights(step, self.config.model)

    def leaves(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """("embedding", array), ("layers/query/0", array), ...: one slice at a time, float32, on the host."""
        weights = self.weights(step)
        for path, layer in weights.slices():
            yield path if layer is None else f"{path}/{layer}", np.asarray(weights.read(path, layer), np.float32)

    def optimizer_state(self, step: int) -> Tree | None:
        """The optimizer's state as nested dicts of arrays; None if the checkpoint has none."""
        return self._store(step).optimizer_tree(step)

    def model(self, step: int) -> MiniCPM:
        return MiniCPM(self.config.model, self.parameters(step), self.compute)

    @cached_property
    def compute(self) -> ComputeConfig:
        """How its model is computed in a study: float32, attention that can be differentiated twice, nothing twice."""
        return ComputeConfig(attention="chunked", remat="none", loss_chunk=self.config.compute.loss_chunk)

    def loss(self, step: int, batch: dict[str, Any]) -> float:
        """Mean loss in nats over the weighted tokens of a batch (arrays [B, L], see `cpmjax.data.batches`)."""
        return float(self.loss_of(self.parameters(step), batch))

    def loss_of(self, parameters: Tree, batch: dict[str, Any]) -> jax.Array:
        """The same for any parameters of this shape, those between two checkpoints say; a pure function of both."""
        return mean_loss(MiniCPM(self.config.model, parameters, self.compute), batch)

    def _store(self, step: int) -> Checkpoints:
        if step not in self._stores:
            raise UserError(f"{self.path} has no checkpoint of step {step}: expected one of {_listed(self.steps)}")
        return self._stores[step]

    def _facts_of(self, step: int) -> dict[str, Any]:
        if step not in self._facts:
            facts = self._store(step).metadata(step)
            if "stage" not in facts:
                raise UserError(f"{self._store(step).directory / str(step)}: has no stage; expected a run's metadata")
            self._facts[step] = facts
        return self._facts[step]

    # Descent.

    def _find_parent(self) -> Series | None:
        if not self._run.provenance_file.exists():
            return None
        parent = self._run.provenance().get("parent")
        if parent is None:
            return None
        beside = self._run.path.resolve().parent / Path(parent["run"]).name
        for folder in (beside, Path(parent["run"])):  # beside first: a folder of runs may be a copy
            if RunDirectory(folder).exists and (found := Series(folder))._is(parent):
                return found
        return None

    def _is(self, parent: dict[str, Any]) -> bool:
        """Whether this run is the one that a branch names as its parent, perhaps moved since."""
        here, there = self._run.path.resolve(), Path(parent["run"])
        return here == there or (here.name == there.name and fingerprint(self.config) == parent["fingerprint"])


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:5], "...", *shown[-5:]])
