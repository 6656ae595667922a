"""AdamW from the parameter declarations: global clip, Adam, then each class's own rate and decay."""

from __future__ import annotations

import jax
import optax

from cpmjax.model.mup import LeafScales, Scales, scales
from cpmjax.model.parameters import Tree
from cpmjax.run.config import ModelConfig, OptimizerConfig


def adam_by_class(config: OptimizerConfig, leaves: Tree) -> optax.GradientTransformation:
    """Adam with an epsilon for each class, epsilon * `LeafScales.epsilon`.

    Dividing the gradient by a factor does to Adam's update what multiplying epsilon by it does; the moments are then
    those of the divided gradient.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)

    def update(grads, state, params=None):
        return adam.update(jax.tree.map(lambda grad, leaf: grad / leaf.epsilon, grads, leaves), state, params)

    return optax.GradientTransformation(adam.init, update)


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


def make_optimizer(
    model: ModelConfig, config: OptimizerConfig, given: Scales | None = None
) -> optax.GradientTransformationExtraArgs:
    """`update(grads, state, params, learning_rate=, weight_decay=)`, both from `cpmjax.model.mup.per_step`.

    `given` replaces the scales of the model's own parametrisation.
    """
    leaves = (given or scales(model, config.weight_decay_mode)).leaves
    return optax.chain(optax.clip_by_global_norm(config.clip), adam_by_class(config, leaves), scale_by_class(leaves))
