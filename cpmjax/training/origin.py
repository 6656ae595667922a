"""Where a run begins: at nothing, or at a checkpoint of another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpmjax.checkpoint.store import Checkpoints
from cpmjax.run import cli
from cpmjax.run.config import Config, differences, encode, fingerprint
from cpmjax.run.directory import RunDirectory
from cpmjax.run.errors import UserError

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

    Raises UserError if the branch point is no stable checkpoint of the parent, or the model is not the parent's.
    """
    run, step = config.branch.run, config.branch.step
    if run is None or step is None:
        return Origin({"kind": "trained"})
    parent = RunDirectory(run)
    theirs = parent.read_config()
    changed = [key for key in differences(theirs, encode(config)) if key.startswith("model.")]
    if changed:
        raise UserError(f"{', '.join(changed)}: expected as in {parent.path}, a branch goes on with the same model")
    store = Checkpoints(parent.checkpoints)
    stages = {each: store.metadata(each).get("stage") for each in store.steps()}
    if stages.get(step) != "stable":
        stable = ", ".join(str(each) for each, stage in stages.items() if stage == "stable") or "none"
        found = f"is in the stage {stages[step]}" if step in stages else "has no checkpoint"
        raise UserError(f"branch.step = {step} of {parent.path} {found}; expected a stable checkpoint: {stable}")
    moments = store.has_optimizer(step)
    rewarmup = config.branch.rewarmup
    if rewarmup is None:
        rewarmup = 0 if moments else _REWARMUP
    position = store.position(step)
    facts = {
        "run": str(parent.path.resolve()),
        "step": step,
        "fingerprint": fingerprint(cli.decode(theirs, str(parent.config_file))),
        "position": position["sequences"] if position is not None else 0,
        "moments": "restored" if moments else "fresh",
        "rewarmup": rewarmup,
    }
    return Origin.read({"kind": "branch", "parent": facts})
