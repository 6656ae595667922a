"""Optimizers from the parameter declarations: global clip, the rule of the optimizer, then each class's rate and decay.

The rules are optax's; what is here only composes them. N layers, I inputs, O outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformation as Rule
from optax import contrib

from cpmjax.model.mup import LeafScales, Scales, scales
from cpmjax.model.parameters import Tree, specs
from cpmjax.run.config import ModelConfig
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, ScheduleFree
from cpmjax.training.eight_bits import at_rest_in_eight_bits
from cpmjax.training.rounding import at_rest_in_bfloat16


def _adam(config: AdamW | Muon, model: ModelConfig) -> Rule:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _lion(config: Lion, model: ModelConfig) -> Rule:
    return optax.scale_by_lion(b1=config.beta1, b2=config.beta2)


def _adafactor(config: Adafactor, model: ModelConfig) -> Rule:
    return by_layer(
        optax.chain(
            # Every matrix is factored: what optax leaves whole, below 128, would change with the width.
            optax.scale_by_factored_rms(decay_rate=config.decay_exponent, min_dim_size_to_factor=2),
            optax.clip_by_block_rms(config.update_clip),
            optax.scale_by_param_block_rms(config.smallest_scale),
        )
    )


def _muon(config: Muon, model: ModelConfig) -> Rule:
    def sides(updates: Tree) -> Tree:
        """Of matrices stacked over layers: each layer's [in, out] is one matrix."""
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

    def spectral(updates: Tree, params: Tree | None) -> Tree:
        """From an operator norm of 1 to sqrt(fan out / fan in), where that is more."""
        return jax.tree.map(lambda x_NIO: x_NIO * math.sqrt(max(1, x_NIO.shape[2] / x_NIO.shape[1])), updates)

    muon = optax.chain(
        contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=sides), optax.stateless(spectral)
    )
    sizes = jax.tree.map(lambda spec: config.update_size(spec.role), specs(model))
    return optax.partition({"spectral": muon, "entry": _adam(config, model)}, sizes)


def _without_momentum(config: ScheduleFree, model: ModelConfig) -> Rule:
    return optax.scale_by_rms(config.beta2, config.epsilon, eps_in_sqrt=False, bias_correction=True)


RULES: dict[type[OptimizerConfig], Callable[[Any, ModelConfig], Rule]] = {
    AdamW: _adam,
    Lion: _lion,
    Adafactor: _adafactor,
    Muon: _muon,
    ScheduleFree: _without_momentum,
}


def make_optimizer(
    model: ModelConfig, config: OptimizerConfig, given: Scales | None = None
) -> optax.GradientTransformationExtraArgs:
    """`update(grads, state, params, learning_rate=, weight_decay=)`, both from `cpmjax.model.mup.per_step`; also
    `grad_norm=` where the gradients are only a part of those whose norm is clipped.

    `given` replaces the scales of the model's own parametrisation.
    """
    leaves = (given or scales(model, config)).leaves
    rule = RULES[type(config)](config, model)
    if config.state_dtype == "bfloat16":
        rule = at_rest_in_bfloat16(rule)
    elif config.state_dtype == "int8":
        rule = at_rest_in_eight_bits(rule)
    rule = epsilon_by_class(rule, leaves)
    clip, by_class = clip_by_global_norm(config.clip), scale_by_class(leaves)
    if isinstance(config, ScheduleFree):
        return optax.chain(clip, averaging(config, optax.chain(rule, by_class)))
    return optax.chain(clip, rule, by_class)


def clip_by_global_norm(most: float) -> optax.GradientTransformationExtraArgs:
    """optax's, told the norm."""

    def update(updates, state, params=None, *, grad_norm=None, **_):
        norm = optax.global_norm(updates) if grad_norm is None else grad_norm
        return jax.tree.map(lambda x: jnp.where(norm < most, x, (x / norm) * most), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def epsilon_by_class(rule: Rule, leaves: Tree) -> Rule:
    """A rule with an epsilon for each class, its own * `LeafScales.epsilon`.

    Dividing the gradient by a factor does to an update that forgets the size of gradients what multiplying epsilon by
    it does; the moments are then those of the divided gradient.
    """

    def update(grads, state, params=None):
        return rule.update(jax.tree.map(lambda grad, leaf: grad / leaf.epsilon, grads, leaves), state, params)

    return optax.GradientTransformation(rule.init, update)


def scale_by_class(leaves: Tree) -> optax.GradientTransformationExtraArgs:
    """update -> -(rate_i * learning_rate * update + decay_i * weight_decay * parameter), i the parameter.

    `learning_rate` and `weight_decay` come with each call, as arrays: one compiled step serves every schedule.
    """

    def update(updates, state, params=None, *, learning_rate, weight_decay, **_):
        def leaf(update: jax.Array, parameter: jax.Array, scale: LeafScales) -> jax.Array:
            rate, decay = scale.rate * learning_rate, scale.decay * weight_decay
            return -(rate * update + decay * parameter)

        return jax.tree.map(leaf, updates, params, leaves), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def averaging(config: ScheduleFree, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """optax.contrib.schedule_free around a rule, with the learning rate of each call in place of a schedule's."""

    def wrapped(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        return contrib.schedule_free(rule, learning_rate, b1=config.beta1)

    def update(grads, state, params=None, *, learning_rate, **others):
        return wrapped(learning_rate).update(grads, state, params, learning_rate=learning_rate, **others)

    return optax.GradientTransformationExtraArgs(wrapped(0.0).init, update)


class ByLayer(NamedTuple):
    layers: optax.OptState  # of the parameters in the layers, stacked over them
    others: optax.OptState


def by_layer(rule: Rule) -> Rule:
    """A rule that looks at whole tensors, so that each layer of what is stacked over layers is a tensor to it."""

    def halves(tree: Tree) -> tuple[Tree, Tree]:
        others = {name: leaf for name, leaf in tree.items() if name != "layers"}
        return {"layers": tree["layers"]}, others

    def init(params: Tree) -> ByLayer:
        layers, others = halves(params)
        return ByLayer(jax.vmap(rule.init)(layers), rule.init(others))

    def update(grads: Tree, state: ByLayer, params: Tree) -> tuple[Tree, ByLayer]:
        of_layers, of_others = zip(halves(grads), state, halves(params), strict=True)
        layers, layers_state = jax.vmap(rule.update)(*of_layers)
        others, others_state = rule.update(*of_others)
        return layers | others, ByLayer(layers_state, others_state)

    return optax.GradientTransformation(init, update)
