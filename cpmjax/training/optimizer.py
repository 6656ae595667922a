"""AdamW from the parameter declarations: global clip, Adam, then each class's own rate and decay."""

from __future__ import annotations

import jax
import optax

from cpmjax.model.mup import LeafHyperparameters, hyperparameters
from cpmjax.model.parameters import Tree
from cpmjax.run.config import ModelConfig, OptimizerConfig


def scale_by_class(multipliers: Tree) -> optax.GradientTransformationExtraArgs:
    """update -> -(rate_i * learning_rate * update + decay_i * weight_decay * parameter), i the parameter.

    `learning_rate` and `weight_decay` come with each call, as arrays: one compiled step serves every schedule.
    """

    def update(updates, state, params=None, *, learning_rate, weight_decay, **_):
        def leaf(multiplier: LeafHyperparameters, update: jax.Array, parameter: jax.Array) -> jax.Array:
            rate, decay = multiplier.rate * learning_rate, multiplier.decay * weight_decay
            return -(rate * update + decay * parameter)

        return jax.tree.map(leaf, multipliers, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(model: ModelConfig, config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`update(grads, state, params, learning_rate=, weight_decay=)`, both from `cpmjax.model.mup.per_step`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        scale_by_class(hyperparameters(model, config.weight_decay_mode)),
    )
