"""Where a run begins: at nothing, or at a checkpoint of another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from cpmjax.checkpoint.store import Checkpoints, refuse_used
from cpmjax.run import cli
from cpmjax.run.config import Config
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError
from cpmjax.run.identity import differences, encode, fingerprint
from cpmjax.run.optimizers import OptimizerConfig
from cpmjax.training.average import Average, new_average
from cpmjax.training.padding import abstract_at_rest, from_rest
from cpmjax.training.state import TrainState, create_state, new_moments

_REWARMUP = 100  # steps, for a branch whose parent brought no moments


@dataclass(frozen=True)
class Origin:
    """Steps and rows that lie before the run, and how many steps its rate warms up again; kept in provenance.json."""

    provenance: dict[str, Any]
    step: int = 0
    position: int = 0
    rewarmup: int = 0

    @classmethod
    def read(cls, provenance: dict[str, Any]) -> Origin:
        if "parent" not in provenance:
            return cls(provenance)
        parent = provenance["parent"]
        return cls(provenance, parent["step"], parent["position"], parent["rewarmup"])

    @property
    def parent(self) -> RunDirectory | None:
        return RunDirectory(self.provenance["parent"]["run"]) if "parent" in self.provenance else None

    def __str__(self) -> str:
        if self.parent is None:
            return "from scratch"
        moments = self.provenance["parent"]["moments"]
        again = f", rate warmed up again over {self.rewarmup} steps" if self.rewarmup else ""
        return f"a branch of {self.parent.path} at step {self.step}, {moments} moments{again}"


def new_origin(config: Config) -> Origin:
    """The origin of a run that does not exist yet.

    Raises UserError if the branch point is no stable checkpoint of the parent, if the model is not the parent's, or if
    the folder for its checkpoints is not empty.
    """
    refuse_used(config.checkpoint)
    run, step = config.branch.run, config.branch.step
    if run is None or step is None:
        return Origin({"kind": "trained"})
    parent = RunDirectory(run)
    theirs = cli.decode(parent.read_config(), str(parent.config_file))
    changed = [key for key in differences(encode(theirs), encode(config)) if key.startswith("model.")]
    if changed:
        raise UserError(f"{', '.join(changed)}: expected as in {parent.path}, a branch goes on with the same model")
    store = Checkpoints(parent.checkpoints)
    stages = {each: store.metadata(each).get("stage") for each in store.steps()}
    # Of an imported checkpoint nobody may know the stage; whoever branches there does.
    if stages.get(step) not in ("stable", "imported"):
        stable = ", ".join(str(each) for each, stage in stages.items() if stage in ("stable", "imported")) or "none"
        found = f"is in the stage {stages[step]}" if step in stages else "has no checkpoint"
        raise UserError(f"branch.step = {step} of {parent.path} {found}; expected a stable checkpoint: {stable}")
    # Moments of one optimizer are nothing to another, nor are codes of 8 bits to one that keeps numbers.
    moments = store.has_optimizer(step) and _stored_alike(theirs.optimizer, config.optimizer)
    rewarmup = config.branch.rewarmup
    if rewarmup is None:
        rewarmup = 0 if moments else _REWARMUP
    position = store.position(step)
    facts = {
        "run": str(parent.path.resolve()),
        "step": step,
        "fingerprint": fingerprint(theirs),
        "position": position["sequences"] if position is not None else 0,
        "moments": "restored" if moments else "fresh",
        "rewarmup": rewarmup,
    }
    return Origin.read({"kind": "branch", "parent": facts})


def _stored_alike(one: OptimizerConfig, other: OptimizerConfig) -> bool:
    return type(one) is type(other) and (one.state_dtype == "int8") == (other.state_dtype == "int8")


def starting_state(
    config: Config,
    origin: Origin,
    checkpoints: Checkpoints,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> tuple[int, TrainState]:
    """(step, state) to go on from: the run's newest checkpoint, else its parent's, else new ones.

    The average is restored as well, a branch goes on with its parent's; where there was none it begins here.
    """
    restored = True
    if checkpoints.steps():
        source, step = checkpoints, checkpoints.steps()[-1]
    elif origin.parent is not None:
        source, step = Checkpoints(origin.parent.checkpoints), origin.step
        restored = origin.provenance["parent"]["moments"] == "restored"
    else:
        return 0, create_state(config.model, optimizer, abstract, config.run.seed)
    stored = abstract_at_rest(config.model, abstract)
    parameters = from_rest(source.parameters(step, stored.trainable), abstract.trainable)
    moments = source.optimizer(step, stored.optimizer) if restored else None
    if moments is None:
        moments = new_moments(config.model, optimizer, parameters, abstract.optimizer)
    moments = from_rest(moments, abstract.optimizer)
    position = source.position(step) or {}
    skipped = np.int32(position.get("skipped", 0))
    state = TrainState(parameters, moments, jax.device_put(skipped, abstract.skipped.sharding))
    if abstract.average is not None:
        wanted, average = abstract.average, new_average(parameters)
        if "averaged" in position:
            found = source.parameters(step, stored.average.parameters, "average")
            average = Average(from_rest(found, wanted.parameters), np.int32(position["averaged"]))
        state.average = jax.device_put(average, jax.tree.map(lambda x: x.sharding, wanted))
    return step, state
