"""muP, explicit: what each role of parameter gets, as powers of m = width / dim_model_base.

A parametrisation is a frozen table; initial scale, learning rate and the forward multipliers are read from it, so
another parametrisation, or a planted fault, is another table. Sources: MiniCPM paper, Table 7, and the training code
of the same family (thunlp/BlockFFN), which refines it: matrices get init_std / sqrt(m) and lr / m, while embedding,
head and norms keep init_std and the full rate; logits are divided by m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from cpmjax.model.parameters import ParamSpec, Role, Tree, path_name, specs
from cpmjax.run.config import ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Rule:
    """What one role gets."""

    init: float = 0.0  # initial std = init_std * m ** init
    rate: float = 0.0  # learning rate = rate of the schedule * m ** rate
    constant: float | None = None  # if set, every entry starts as this instead of random


@dataclass(frozen=True)
class Parametrisation:
    embedding: Rule
    head: Rule
    matrix: Rule
    norm: Rule
    logits: float  # the last hidden state is multiplied by m ** logits before the head

    def rule(self, role: Role) -> Rule:
        return getattr(self, role)


PARAMETRISATIONS = {
    "minicpm": Parametrisation(
        embedding=Rule(), head=Rule(), matrix=Rule(init=-0.5, rate=-1.0), norm=Rule(constant=1.0), logits=-1.0
    ),
    # Table 7 read to the letter: "each two-dimensional tensor" is scaled, embedding and head too, and "other
    # parameters" start at 0.1. Kept for comparison: its embedding learns m times too slowly.
    "minicpm_table7": Parametrisation(
        embedding=Rule(init=-0.5, rate=-1.0),
        head=Rule(init=-0.5, rate=-1.0),
        matrix=Rule(init=-0.5, rate=-1.0),
        norm=Rule(constant=0.1),
        logits=-1.0,
    ),
    "standard": Parametrisation(
        embedding=Rule(), head=Rule(), matrix=Rule(), norm=Rule(constant=1.0), logits=0.0
    ),
}  # fmt: skip


def parametrisation(config: ModelConfig) -> Parametrisation:
    return PARAMETRISATIONS[config.parametrisation]


def logit_scale(config: ModelConfig) -> float:
    """What the last hidden state is multiplied by: dim_model_base / width for every released MiniCPM."""
    return config.width_multiplier ** parametrisation(config).logits


def residual_scale(config: ModelConfig) -> float:
    """What each residual branch is multiplied by: scale_depth / sqrt(layers)."""
    return config.scale_depth / math.sqrt(config.layers)


def init_std(config: ModelConfig, spec: ParamSpec) -> float:
    return config.init_std * config.width_multiplier ** parametrisation(config).rule(spec.role).init


def rate_multiplier(config: ModelConfig, spec: ParamSpec) -> float:
    return config.width_multiplier ** parametrisation(config).rule(spec.role).rate


@dataclass(frozen=True)
class LeafHyperparameters:
    """One update is p -= rate * learning_rate * adam + decay * weight_decay * p (see `per_step`)."""

    rate: float
    decay: float


def hyperparameters(config: ModelConfig, mode: str) -> Tree:
    """A `LeafHyperparameters` for each parameter.

    `mode` says how the decay of a tensor class depends on its learning rate (mechanism: Wang & Aitchison 2405.13698):
    `coupled`      decay = (learning rate of the class) * weight_decay, MiniCPM's: matrices decay 1/m as fast;
    `scaled`       decay = (learning rate of the schedule) * weight_decay, the same for every class and width;
    `independent`  decay = (share of the peak rate) * weight_decay, whatever the peak: weight_decay is then the
                   fraction removed in one step of the stable stage.
    """

    def leaf(spec: ParamSpec) -> LeafHyperparameters:
        multiplier = rate_multiplier(config, spec)
        return LeafHyperparameters(rate=multiplier, decay=multiplier if mode == "coupled" else 1.0)

    return jax.tree.map(leaf, specs(config))


def per_step(optimizer: OptimizerConfig, factor: float) -> tuple[float, float]:
    """(learning rate, weight decay) of a step whose schedule stands at `factor` of the peak."""
    rate = optimizer.learning_rate * factor
    scale = factor if optimizer.weight_decay_mode == "independent" else rate
    return rate, scale * optimizer.weight_decay


def describe(config: ModelConfig, optimizer: OptimizerConfig) -> str:
    """The table that a run prints: what each tensor class gets, with numbers, at the peak of the schedule."""
    rate, decay = per_step(optimizer, 1.0)
    rows = [("tensor", "shape", "role", "init std", "lr multiplier", "peak lr", "decay a step")]
    leaves = jax.tree.leaves(hyperparameters(config, optimizer.weight_decay_mode))
    for (path, spec), leaf in zip(jax.tree_util.tree_leaves_with_path(specs(config)), leaves, strict=True):
        constant = parametrisation(config).rule(spec.role).constant
        start = f"{init_std(config, spec):.5g}" if constant is None else f"all {constant:g}"
        shape = " x ".join(map(str, spec.shape))
        numbers = (f"{leaf.rate:.5g}", f"{leaf.rate * rate:.4g}", f"{leaf.decay * decay:.3g}")
        rows.append((path_name(path), shape, spec.role, start, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    heading = (
        f"parametrisation {config.parametrisation}: m = {config.width} / {config.dim_model_base} = "
        f"{config.width_multiplier:g}; embeddings x {config.scale_emb:g}, branches x {residual_scale(config):.4g}, "
        f"hidden state before the head x {logit_scale(config):.4g}; weight decay {optimizer.weight_decay_mode}"
    )
    return "\n".join([heading, *lines])
