"""Planted faults: MiniCPM's table with one entry replaced. A check that does not see them proves nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpmjax.model.mup import PARAMETRISATIONS, Parametrisation, Rule
from cpmjax.run.errors import UserError

_MINICPM = PARAMETRISATIONS["minicpm"]


def table_of(name: str) -> Parametrisation:
    """A parametrisation or a planted fault by name. Raises UserError if there is none."""
    if name in FAULTS:
        return FAULTS[name].table
    if name not in PARAMETRISATIONS:
        known = ", ".join([*PARAMETRISATIONS, *FAULTS])
        raise UserError(f"--parametrisations: {name}: expected some of {known}")
    return PARAMETRISATIONS[name]


@dataclass(frozen=True)
class Fault:
    table: Parametrisation
    bar: float = 0.40  # how far beyond what is expected at least one slope must be


FAULTS = {
    # Spectral updates are right without a scale; for them the fault is Adam's.
    "no_matrix_rate": Fault(
        replace(_MINICPM, matrix=replace(_MINICPM.matrix, rate=0.0, rate_relative=0.0, rate_spectral=-1.0))
    ),
    "no_matrix_init": Fault(replace(_MINICPM, matrix=replace(_MINICPM.matrix, init=0.0))),
    "no_logit_scale": Fault(replace(_MINICPM, logits=0.0)),
    # Table 7 of the paper, read to the letter.
    "slow_embedding": Fault(replace(_MINICPM, embedding=Rule(rate=-1.0, rate_relative=-1.0))),
    "growing_heads": Fault(replace(_MINICPM, heads=0.0), bar=0.30),
}
