"""Which optimizer, with the options that it has: `optimizer.type` in the YAML chooses one.

Rates are those at the base width; each tensor class gets its muP multiple of them, which depends on the size that an
optimizer gives to its updates (`cpmjax.model.mup`). The mathematics is optax's (`cpmjax.training.optimizer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import draccus

WeightDecayMode = Literal["coupled", "independent", "scaled"]
# What an update is 1 of, whatever the gradient was: the size of an entry, the RMS of the entries in units of that of
# the parameter, the operator norm in units of sqrt(fan out / fan in).
UpdateSize = Literal["entry", "relative", "spectral"]


@dataclass(frozen=True)
class OptimizerConfig(draccus.ChoiceRegistry):
    """What every optimizer has."""

    learning_rate: float = 0.01  # the peak, at the base width; each tensor class gets its muP multiple of it
    weight_decay: float = 0.1
    weight_decay_mode: WeightDecayMode = "coupled"  # see cpmjax.model.mup
    clip: float = 1.0  # global norm of the gradient
    state_dtype: Literal["float32", "bfloat16", "int8"] = (
        "float32"  # of moments at rest: training/{rounding,eight_bits}
    )

    offload: bool = False  # its state stays in the memory of hosts between updates; see cpmjax.training.offload

    def update_size(self, role: str) -> UpdateSize:
        """Of the parameters of a role (`cpmjax.model.parameters.Role`)."""
        return "entry"

    def rate(self, role: str) -> float:
        """Learning rate of a role, as a multiple of `learning_rate`, before muP."""
        return 1.0

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("learning_rate", "clip", "epsilon", "update_clip", "smallest_scale", "adam_rate"):
            if hasattr(self, key) and not getattr(self, key) > 0:
                yield key, "a positive number"
        for key in ("beta1", "beta2", "momentum"):
            if hasattr(self, key) and not 0 <= getattr(self, key) < 1:
                yield key, "a number from 0 to below 1"
        if self.weight_decay < 0:
            yield "weight_decay", "0 or more"


@OptimizerConfig.register_subclass("adamw")
@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """Loshchilov & Hutter 1711.05101, with MiniCPM's values ([D] of the reference: betas 0.9 and 0.95, decay 0.1, clip
    1.0; paper A.1: rate 0.01)."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8


@OptimizerConfig.register_subclass("lion")
@dataclass(frozen=True)
class Lion(OptimizerConfig):
    """Chen et al. 2302.06675: the sign of a momentum. Its authors advise a rate 3 to 10 times below AdamW's, and a
    decay that is as many times larger."""

    learning_rate: float = 0.001
    weight_decay: float = 1.0
    beta1: float = 0.9  # share of the momentum in what the sign is taken of
    beta2: float = 0.99  # of the momentum


@OptimizerConfig.register_subclass("adafactor")
@dataclass(frozen=True)
class Adafactor(OptimizerConfig):
    """Shazeer & Stern 1804.04235, algorithm 4, without momentum: second moments kept as row and column means of each
    layer's matrix, updates clipped by their RMS, and in units of the parameter's RMS. The rate is the schedule's, in
    place of theirs, min(0.01, 1 / sqrt(t)); the decay is AdamW's."""

    decay_exponent: float = 0.8  # second moments forget as 1 - t ** -decay_exponent
    update_clip: float = 1.0  # the most that the RMS of an update may be, before rate and units
    smallest_scale: float = 1e-3  # the unit of a parameter whose RMS is below it

    def update_size(self, role: str) -> UpdateSize:
        return "relative"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.state_dtype == "int8":
            yield "state_dtype", "float32 or bfloat16: means over rows and columns take next to nothing"
        if self.offload:
            yield "offload", "False: means over rows and columns take next to nothing"
        if not 0 < self.decay_exponent <= 1:
            yield "decay_exponent", "a number above 0, up to 1"


@OptimizerConfig.register_subclass("muon")
@dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon): matrices between hidden layers move by their Nesterov
    momentum, orthogonalised by five Newton-Schulz iterations; embedding, head and norms, as he says, by AdamW."""

    learning_rate: float = 0.02  # of the matrices
    momentum: float = 0.95
    adam_rate: float = 0.5  # learning rate of AdamW, as a multiple of that of the matrices
    beta1: float = 0.9  # of AdamW, as are beta2 and epsilon
    beta2: float = 0.95
    epsilon: float = 1e-8

    def update_size(self, role: str) -> UpdateSize:
        return "spectral" if role == "matrix" else "entry"

    def rate(self, role: str) -> float:
        return 1.0 if role == "matrix" else self.adam_rate


@OptimizerConfig.register_subclass("schedule_free")
@dataclass(frozen=True)
class ScheduleFree(OptimizerConfig):
    """AdamW without momentum on a sequence z; the gradient is taken at y, between z and its average x (Defazio et al.
    2405.15682). A run trains y; x is its average (`cpmjax.training.average`). Meant for a schedule that does not
    decay; what each z counts in the average is the square of the largest rate until then."""

    beta1: float = 0.9  # y = (1 - beta1) z + beta1 x
    beta2: float = 0.95
    epsilon: float = 1e-8

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if self.beta1 == 0:
            yield "beta1", "more than 0: x is found from y and z"
