"""muP, explicit: what each role of parameter gets, as powers of m = width / dim_model_base, n = layers / layers_base.

A parametrisation is a frozen table; initial scale, learning rate, Adam's epsilon and the forward multipliers are read
from it, so another parametrisation, or a planted fault, is another table. Sources: MiniCPM paper, Table 7, and the
training code of the same family (thunlp/BlockFFN), which refines it: matrices get init_std / sqrt(m) and lr / m, while
embedding, head and norms keep init_std and the full rate; logits are divided by m.

What a rate has to be depends on the size that the optimizer gives its updates. A matrix between hidden layers learns
alike at every width if the operator norm of its update is sqrt(fan out / fan in) at every width (Yang, Simon &
Bernstein 2310.17813), and an update whose entries have one sign pattern with its input has a norm of m times an entry:
`entry`     entries of size 1, as Adam's: lr / m (Yang et al. 2203.03466, Tables 3 and 8). So with Lion, whose entries
            are signs (Yang & Littwin 2308.01814 prove it for any update that is a function of each entry's gradients),
            and with schedule-free AdamW: its averages are the same combination of iterates at every width.
`relative`  entries of the size of the parameter's, as Adafactor's: a matrix has entries of 1 / sqrt(m), so
            lr / sqrt(m) is left (Everett et al. 2407.05872 derive it); embedding, head and norms keep the full rate.
`spectral`  an operator norm of 1 in the right units, as Muon's: the full rate (2310.17813, section 5).
All of them forget the size of the gradient; where a rule scales Adam's epsilon, theirs, if they have one, follows it.
The depth rules were derived for Adam and are checked with it alone; a run with another optimizer is refused them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax

from cpmjax.model.parameters import ParamSpec, Role, Tree, path_name, specs
from cpmjax.run.config import ModelConfig
from cpmjax.run.optimizers import AdamW, OptimizerConfig, UpdateSize
from cpmjax.run.table import aligned


@dataclass(frozen=True)
class Rule:
    """What one role gets. Powers of n hold for the tensors of a layer, not for those outside of the layers."""

    init: float = 0.0  # initial std = init_std * m ** init
    rate: float = 0.0  # learning rate = rate of the schedule * m ** rate * n ** rate_depth
    rate_relative: float = 0.0  # in place of `rate`, for updates in units of the parameter
    rate_spectral: float = 0.0  # the same, for updates of one operator norm
    rate_depth: float = 0.0
    epsilon: float = 0.0  # Adam's epsilon = epsilon * m ** epsilon * n ** epsilon_depth
    epsilon_depth: float = 0.0
    constant: float | None = None  # if set, every entry starts as this instead of random

    def width_power(self, size: UpdateSize) -> float:
        return {"entry": self.rate, "relative": self.rate_relative, "spectral": self.rate_spectral}[size]


@dataclass(frozen=True)
class Parametrisation:
    embedding: Rule
    head: Rule
    matrix: Rule
    norm: Rule
    logits: float  # the last hidden state is multiplied by m ** logits before the head
    residual: float = 0.0  # each branch is multiplied by scale_depth / sqrt(layers) * n ** residual
    heads: float = 1.0  # a model made m times wider has m ** heads times the heads: at 1 they keep their width

    def rule(self, role: Role) -> Rule:
        return getattr(self, role)


_ONES, _MATRIX = Rule(constant=1.0), Rule(init=-0.5, rate=-1.0, rate_relative=-0.5)

PARAMETRISATIONS = {
    "minicpm": Parametrisation(embedding=Rule(), head=Rule(), matrix=_MATRIX, norm=_ONES, logits=-1.0),
    # Table 7 read to the letter: "each two-dimensional tensor" is scaled, embedding and head too, and "other
    # parameters" start at 0.1. Kept for comparison: its embedding learns m times too slowly.
    "minicpm_table7": Parametrisation(
        embedding=_MATRIX, head=_MATRIX, matrix=_MATRIX, norm=Rule(constant=0.1), logits=-1.0
    ),
    "standard": Parametrisation(embedding=Rule(), head=Rule(), matrix=Rule(), norm=_ONES, logits=0.0),
    # The two depth rules for Adam as Dey et al. (CompleteP, 2505.01618) give them: branches * n ** -a, the rates of a
    # layer * n ** (a - 1), epsilon * n ** -a / m. Depth-muP (Yang et al. 2310.02244) is a = 1/2, which has MiniCPM's
    # branches and lowers the rates; CompleteP is a = 1. Their authors decay as `scaled` does, see `scales`.
    "depth_mup": Parametrisation(
        embedding=Rule(),
        head=Rule(),
        matrix=replace(_MATRIX, rate_depth=-0.5, epsilon=-1.0, epsilon_depth=-0.5),
        norm=Rule(constant=1.0, rate_depth=-0.5),
        logits=-1.0,
    ),
    "completep": Parametrisation(
        embedding=Rule(),
        head=Rule(),
        matrix=replace(_MATRIX, epsilon=-1.0, epsilon_depth=-1.0),
        norm=_ONES,
        logits=-1.0,
        residual=-0.5,
    ),
}


Number = float | jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LeafScales:
    """What one parameter gets. One step is p -= rate * learning_rate * update + decay * weight_decay * p, with
    both rates from `per_step`, and the optimizer's epsilon multiplied by `epsilon`."""

    mean: Number  # of the initial entries
    std: Number
    rate: Number
    decay: Number
    epsilon: Number


class Multipliers(NamedTuple):
    """The forward pass's part of a parametrisation."""

    embedding: Number  # of embeddings
    residual: Number  # of each branch before it is added
    logits: Number  # of the last hidden state before the head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scales:
    """A parametrisation in numbers, at one size: Python numbers in a run, arrays in a sweep, where one compiled step
    serves every parametrisation."""

    leaves: Tree  # a `LeafScales` for each parameter
    multipliers: Multipliers


def parametrisation(config: ModelConfig) -> Parametrisation:
    return PARAMETRISATIONS[config.parametrisation]


def multipliers(config: ModelConfig, table: Parametrisation | None = None) -> Multipliers:
    """Of every released MiniCPM: scale_emb, scale_depth / sqrt(layers), dim_model_base / width."""
    table = table or parametrisation(config)
    residual = config.scale_depth / math.sqrt(config.layers) * config.depth_multiplier**table.residual
    return Multipliers(config.scale_emb, residual, config.width_multiplier**table.logits)


def scales(config: ModelConfig, optimizer: OptimizerConfig = AdamW(), table: Parametrisation | None = None) -> Scales:
    """The numbers of a table (by default that of `config.parametrisation`) for a model of this size.

    `optimizer.weight_decay_mode` says how the decay of a tensor class depends on its learning rate (Wang & Aitchison
    2405.13698):
    `coupled`      decay = (learning rate of the class) * weight_decay, MiniCPM's: matrices decay 1/m as fast;
    `scaled`       decay = (learning rate of the schedule) * weight_decay, the same for every class and width;
    `independent`  decay = (share of the peak rate) * weight_decay, whatever the peak: weight_decay is then the
                   fraction removed in one step of the stable stage.
    """
    chosen = table or parametrisation(config)
    m = config.width_multiplier

    def leaf(spec: ParamSpec) -> LeafScales:
        rule = chosen.rule(spec.role)
        n = config.depth_multiplier if "layers" in spec.axes else 1.0
        rate = optimizer.rate(spec.role) * m ** rule.width_power(optimizer.update_size(spec.role)) * n**rule.rate_depth
        return LeafScales(
            mean=0.0 if rule.constant is None else rule.constant,
            std=config.init_std * m**rule.init if rule.constant is None else 0.0,
            rate=rate,
            decay=rate if optimizer.weight_decay_mode == "coupled" else 1.0,
            epsilon=m**rule.epsilon * n**rule.epsilon_depth,
        )

    return Scales(jax.tree.map(leaf, specs(config)), multipliers(config, chosen))


def per_step(optimizer: OptimizerConfig, factor: float) -> tuple[float, float]:
    """(learning rate, weight decay) of a step whose schedule stands at `factor` of the peak."""
    rate = optimizer.learning_rate * factor
    scale = factor if optimizer.weight_decay_mode == "independent" else rate
    return rate, scale * optimizer.weight_decay


def describe(config: ModelConfig, optimizer: OptimizerConfig) -> str:
    """The table that a run prints: what each tensor class gets, with numbers, at the peak of the schedule."""
    rate, decay = per_step(optimizer, 1.0)
    numbers = scales(config, optimizer)
    epsilon = getattr(optimizer, "epsilon", None)  # some optimizers have none
    rows = [("tensor", "shape", "role", "init std", "lr multiplier", "peak lr", "decay a step", "epsilon")]

    def row(path: tuple, spec: ParamSpec, leaf: LeafScales) -> None:
        start = f"{leaf.std:.5g}" if leaf.std else f"all {leaf.mean:g}"
        shape = " x ".join(map(str, spec.shape))
        a_step = (f"{leaf.rate * rate:.4g}", f"{leaf.decay * decay:.3g}")
        own_epsilon = "" if epsilon is None else f"{leaf.epsilon * epsilon:.3g}"
        rows.append((path_name(path), shape, spec.role, start, f"{leaf.rate:.5g}", *a_step, own_epsilon))

    jax.tree_util.tree_map_with_path(row, specs(config), numbers.leaves)
    forward = numbers.multipliers
    heading = (
        f"parametrisation {config.parametrisation}: m = {config.width} / {config.dim_model_base} = "
        f"{config.width_multiplier:g}, n = {config.layers} / {config.layers_base} = {config.depth_multiplier:g}; "
        f"embeddings x {forward.embedding:g}, branches x {forward.residual:.4g}, "
        f"hidden state before the head x {forward.logits:.4g}; {OptimizerConfig.get_choice_name(type(optimizer))}, "
        f"weight decay {optimizer.weight_decay_mode}"
    )
    return f"{heading}\n{aligned(rows)}"
