"""AdamW against the same mathematics written out in numpy, in float64."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model import mup
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, specs
from cpmjax.run.config import ModelConfig, OptimizerConfig
from cpmjax.training.optimizer import make_optimizer

WIDER = 4  # m: how many times wider than the base model
MODEL = ModelConfig(vocabulary=23, width=16, layers=2, heads=2, feed_forward=24, dim_model_base=16 // WIDER, tied=False)
FACTORS = (0.5, 1.0, 1.0, 0.4, 0.1)  # shares of the peak rate, as a schedule gives them
CLIP, PEAK, DECAY = 0.7, 0.02, 0.1
# The table of MiniCPM: matrices inside the layers learn m times more slowly, everything else at the full rate.
MATRICES = {f"layers/{name}" for name in ("query", "key", "value", "output", "gate", "up", "down")}


def gradients(step: int) -> dict[str, np.ndarray]:
    """By turns far above the clip and below it, and of very different size from tensor to tensor."""
    random = np.random.default_rng(step)
    shapes = {name: spec.shape for name, spec in flat(specs(MODEL)).items()}
    size = 0.003 if step % 2 else 3.0
    return {name: size * 10 ** random.uniform(-2, 0) * random.normal(size=shape) for name, shape in shapes.items()}


def adamw(parameters: dict[str, np.ndarray], mode: str, epsilons: dict[str, float]) -> dict[str, np.ndarray]:
    """Kingma & Ba (algorithm 1) with decoupled decay (Loshchilov & Hutter), after one global clip."""
    beta1, beta2 = 0.9, 0.95
    first = {name: np.zeros_like(values) for name, values in parameters.items()}
    second = {name: np.zeros_like(values) for name, values in parameters.items()}
    clipped = []
    for step, factor in enumerate(FACTORS, 1):
        grads = gradients(step)
        norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
        clipped.append(norm > CLIP)
        for name, grad in grads.items():
            grad = grad * min(1.0, CLIP / norm)
            first[name] = beta1 * first[name] + (1 - beta1) * grad
            second[name] = beta2 * second[name] + (1 - beta2) * grad**2
            direction = (first[name] / (1 - beta1**step)) / (np.sqrt(second[name] / (1 - beta2**step)) + epsilons[name])
            rate = PEAK * factor * (1 / WIDER if name in MATRICES else 1)
            shrink = {"coupled": rate * DECAY, "scaled": PEAK * factor * DECAY, "independent": factor * DECAY}[mode]
            parameters[name] = parameters[name] - rate * direction - shrink * parameters[name]
    assert any(clipped) and not all(clipped)
    return parameters


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["coupled", "scaled", "independent"])
def test_five_updates_are_those_of_adamw_in_float64(mode):
    check_five_updates(MODEL, OptimizerConfig(weight_decay_mode=mode), dict.fromkeys(flat(specs(MODEL)), 1e-8))


def test_the_epsilon_of_a_class_is_part_of_its_updates():
    """CompleteP at its base depth: matrices have epsilon / m. Epsilon is large, so that it matters."""
    model = replace(MODEL, parametrisation="completep", layers_base=MODEL.layers)
    epsilons = {name: 0.02 / (WIDER if name in MATRICES else 1) for name in flat(specs(model))}
    check_five_updates(model, OptimizerConfig(epsilon=0.02), epsilons)


def check_five_updates(model: ModelConfig, config: OptimizerConfig, epsilons: dict[str, float]) -> None:
    config = replace(config, learning_rate=PEAK, weight_decay=DECAY, clip=CLIP)
    optimizer = make_optimizer(model, config)
    parameters = jax.jit(initialise, static_argnums=0)(model, jax.random.key(1))
    start = {name: np.asarray(x, np.float64) for name, x in flat(parameters).items()}
    expected = adamw(start, config.weight_decay_mode, epsilons)
    state, structure = optimizer.init(parameters), jax.tree.structure(parameters)
    update = jax.jit(optimizer.update)
    for step, factor in enumerate(FACTORS, 1):
        grads = gradients(step)
        tree = jax.tree.unflatten(structure, [jnp.asarray(grads[name], jnp.float32) for name in flat(parameters)])
        rate, decay = mup.per_step(config, factor)
        updates, state = update(tree, state, parameters, learning_rate=rate, weight_decay=decay)
        parameters = jax.tree.map(jnp.add, parameters, updates)
    for name, values in flat(parameters).items():
        np.testing.assert_allclose(np.asarray(values), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
