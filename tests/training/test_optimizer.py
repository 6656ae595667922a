"""Each optimizer against its paper written out in numpy, in float64, and against optax's own where muP says 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from cpmjax.model import mup
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, specs
from cpmjax.run.config import ModelConfig
from cpmjax.run.optimizers import Adafactor, AdamW, Lion, Muon, OptimizerConfig, ScheduleFree
from cpmjax.training.optimizer import RULES, make_optimizer

WIDER = 4  # m: how many times wider than the base model
MODEL = ModelConfig(vocabulary=23, width=16, layers=2, heads=2, feed_forward=24, dim_model_base=16 // WIDER, tied=False)
FACTORS = (0.5, 1.0, 1.0, 0.4, 0.1)  # shares of the peak rate, as a schedule gives them
CLIP, PEAK, DECAY = 0.7, 0.02, 0.1
# The table of MiniCPM: matrices inside the layers learn m times more slowly, everything else at the full rate.
MATRICES = {f"layers/{name}" for name in ("query", "key", "value", "output", "gate", "up", "down")}

Arrays = dict[str, np.ndarray]
Memory = dict[str, Any]  # what a rule keeps of one tensor
Rule = Callable[[Memory, np.ndarray, np.ndarray, int], np.ndarray]  # memory, gradient, parameter, step -> update


def gradients(step: int) -> Arrays:
    """By turns far above the clip and below it, and of very different size from tensor to tensor."""
    random = np.random.default_rng(step)
    shapes = {name: spec.shape for name, spec in flat(specs(MODEL)).items()}
    size = 0.003 if step % 2 else 3.0
    return {name: size * 10 ** random.uniform(-2, 0) * random.normal(size=shape) for name, shape in shapes.items()}


def clipped(step: int) -> Arrays:
    grads = gradients(step)
    norm = np.sqrt(sum((grad**2).sum() for grad in grads.values()))
    assert (norm > CLIP) != step % 2
    return {name: grad * min(1.0, CLIP / norm) for name, grad in grads.items()}


# The rules, as their papers have them.


def adam(epsilon: float = 1e-8) -> Rule:
    """Kingma & Ba, algorithm 1."""
    beta1, beta2 = 0.9, 0.95

    def update(memory, grad, parameter, step):
        first = memory["first"] = beta1 * memory.get("first", 0) + (1 - beta1) * grad
        second = memory["second"] = beta2 * memory.get("second", 0) + (1 - beta2) * grad**2
        return (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + epsilon)

    return update


def lion(memory, grad, parameter, step):
    """Chen et al., algorithm 2."""
    momentum = memory.get("momentum", np.zeros_like(grad))
    memory["momentum"] = 0.99 * momentum + 0.01 * grad
    return np.sign(0.9 * momentum + 0.1 * grad)


def adafactor(memory, grad, parameter, step):
    """Shazeer & Stern, algorithm 4, for each layer."""
    if grad.ndim == 3 or (grad.ndim == 2 and grad.shape[0] == MODEL.layers):
        layers = memory.setdefault("layers", [{} for _ in grad])
        return np.stack([adafactor_of_one(*each, step) for each in zip(layers, grad, parameter, strict=True)])
    return adafactor_of_one(memory, grad, parameter, step)


def adafactor_of_one(memory, grad, parameter, step):
    forget = 1 - step**-0.8
    square = grad**2 + 1e-30
    if grad.ndim == 2:
        rows = memory["rows"] = forget * memory.get("rows", 0) + (1 - forget) * square.sum(axis=1)
        columns = memory["columns"] = forget * memory.get("columns", 0) + (1 - forget) * square.sum(axis=0)
        second = np.outer(rows, columns) / rows.sum()
    else:
        second = memory["second"] = forget * memory.get("second", 0) + (1 - forget) * square
    update = grad / np.sqrt(second)
    update /= max(1.0, np.sqrt((update**2).mean()) / 1.0)
    return update * max(1e-3, np.sqrt((parameter**2).mean()))


def muon(memory, grad, parameter, step):
    """Jordan et al.: the quintic acts on singular values, five times. The momentum is Nesterov's with the bias of both
    its parts corrected (Dozat 2016), as optax has it."""
    momentum = memory["momentum"] = 0.95 * memory.get("momentum", 0) + 0.05 * grad
    ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * grad / (1 - 0.95**step)
    left, values_NK, right = np.linalg.svd(ahead, full_matrices=False)
    values_NK = values_NK / np.linalg.norm(values_NK, axis=-1, keepdims=True)
    for _ in range(5):
        values_NK = 3.4445 * values_NK - 4.7750 * values_NK**3 + 2.0315 * values_NK**5
    fan_in, fan_out = grad.shape[-2:]
    return (left * values_NK[:, None]) @ right * np.sqrt(max(1.0, fan_out / fan_in))


def by_hand(config: OptimizerConfig, parameters: Arrays, rules: dict[str, Rule], powers: dict[str, float]) -> Arrays:
    """One global clip, the rule, the rate of each class as a power of m, decoupled decay (Loshchilov & Hutter)."""
    memories: dict[str, Memory] = {name: {} for name in parameters}
    for step, factor in enumerate(FACTORS, 1):
        for name, grad in clipped(step).items():
            update = rules[name](memories[name], grad, parameters[name], step)
            rate = PEAK * factor * WIDER ** powers[name]
            shrink = {"coupled": rate * DECAY, "scaled": PEAK * factor * DECAY, "independent": factor * DECAY}
            removed = shrink[config.weight_decay_mode] * parameters[name]
            parameters[name] = parameters[name] - rate * update - removed
    return parameters


def trained(model: ModelConfig, config: OptimizerConfig, factors=FACTORS) -> tuple[Arrays, Arrays, Any]:
    """(parameters at the start, parameters after the steps, state of the optimizer)."""
    config = replace(config, learning_rate=PEAK, weight_decay=DECAY, clip=CLIP)
    optimizer = make_optimizer(model, config)
    parameters = jax.jit(initialise, static_argnums=0)(model, jax.random.key(1))
    start = {name: np.asarray(x, np.float64) for name, x in flat(parameters).items()}
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step, factor in enumerate(factors, 1):
        rate, decay = mup.per_step(config, factor)
        updates, state = update(as_tree(gradients(step)), state, parameters, learning_rate=rate, weight_decay=decay)
        parameters = jax.tree.map(jnp.add, parameters, updates)
    assert update._cache_size() == 1
    return start, {name: np.asarray(x) for name, x in flat(parameters).items()}, state


def as_tree(arrays: Arrays) -> dict[str, Any]:
    structure = jax.tree.structure(specs(MODEL))
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name], jnp.float32) for name in flat(specs(MODEL))])


def assert_same(found: Arrays, expected: Arrays, **tolerance) -> None:
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], **tolerance, err_msg=name)


def of_class(matrices: Any, others: Any) -> dict[str, Any]:
    return {name: matrices if name in MATRICES else others for name in flat(specs(MODEL))}


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["coupled", "scaled", "independent"])
def test_five_updates_are_those_of_adamw_in_float64(mode):
    config = AdamW(weight_decay_mode=mode)
    start, found, _ = trained(MODEL, config)
    assert_same(found, by_hand(config, start, of_class(adam(), adam()), of_class(-1, 0)), rtol=1e-5, atol=1e-6)


def test_the_epsilon_of_a_class_is_part_of_its_updates():
    """CompleteP at its base depth: matrices have epsilon / m. Epsilon is large, so that it matters."""
    model = replace(MODEL, parametrisation="completep", layers_base=MODEL.layers)
    start, found, _ = trained(model, AdamW(epsilon=0.02))
    rules = of_class(adam(0.02 / WIDER), adam(0.02))
    assert_same(found, by_hand(AdamW(), start, rules, of_class(-1, 0)), rtol=1e-5, atol=1e-6)


# The power of m that muP gives the rate of matrices and of the rest, and what the rest moves by.
@pytest.mark.parametrize(
    "config, rules, powers",
    [
        (Lion(), of_class(lion, lion), of_class(-1, 0)),
        (Adafactor(), of_class(adafactor, adafactor), of_class(-0.5, 0)),
        (Muon(adam_rate=1.0), of_class(muon, adam()), of_class(0, 0)),
        (Muon(adam_rate=WIDER**-0.5), of_class(muon, adam()), of_class(0, -0.5)),
    ],
    ids=["lion", "adafactor", "muon", "muon, adam slower"],
)
def test_five_updates_are_those_of_the_paper_in_float64(config, rules, powers):
    start, found, _ = trained(MODEL, config)
    assert_same(found, by_hand(config, start, rules, powers), rtol=1e-5, atol=1e-6)


def test_five_updates_of_schedule_free_adamw_in_float64():
    """Defazio et al., algorithm 1: y is trained, x is the average of z by the squares of the largest rates."""
    start, found, state = trained(MODEL, ScheduleFree())
    beta, x, z, y = 0.9, dict(start), dict(start), dict(start)
    seconds, weights, largest = dict.fromkeys(start, 0.0), 0.0, 0.0
    for step, factor in enumerate(FACTORS, 1):
        largest = max(largest, PEAK * factor)
        weights += largest**2
        share = largest**2 / weights
        for name, grad in clipped(step).items():
            rate = PEAK * factor / (WIDER if name in MATRICES else 1)
            seconds[name] = 0.95 * seconds[name] + 0.05 * grad**2
            update = grad / (np.sqrt(seconds[name] / (1 - 0.95**step)) + 1e-8)
            z[name] = z[name] - rate * (update + DECAY * y[name])
            x[name] = (1 - share) * x[name] + share * z[name]
            y[name] = (1 - beta) * z[name] + beta * x[name]
    assert_same(found, y, rtol=1e-5, atol=1e-6)
    average = flat(contrib.schedule_free_eval_params(state[1], as_tree(found)))
    assert_same(average, x, rtol=1e-5, atol=1e-6)


# The whole optimizers of optax, at the base width.


def with_optax(optimizer: optax.GradientTransformation, start: Arrays, factors=FACTORS) -> Arrays:
    parameters = apart(as_tree(start))
    state, update = optimizer.init(parameters), jax.jit(optimizer.update)
    for step, _ in enumerate(factors, 1):
        updates, state = update(apart(as_tree(gradients(step))), state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    layers = [parameters.pop(f"layer {number}") for number in range(MODEL.layers)]
    return flat({**parameters, "layers": jax.tree.map(lambda *each: jnp.stack(each), *layers)})


def apart(tree: dict[str, Any]) -> dict[str, Any]:
    """Each layer for itself: optax's own optimizers know of no stacks."""
    layers = {f"layer {n}": jax.tree.map(lambda x, n=n: x[n], tree["layers"]) for n in range(MODEL.layers)}
    return {name: leaf for name, leaf in tree.items() if name != "layers"} | layers


def rate(count):
    return PEAK * jnp.asarray(FACTORS)[count]


def is_matrix(tree):
    return jax.tree_util.tree_map_with_path(lambda path, x: len(path) == 2 and x.ndim == 2, tree)


@pytest.mark.parametrize(
    "config, theirs, factors",
    [
        (AdamW(), optax.adamw(rate, b2=0.95, weight_decay=DECAY), FACTORS),
        (Lion(), optax.lion(rate, b1=0.9, b2=0.99, weight_decay=DECAY), FACTORS),
        (
            # optax decays at a rate of its own, here with the schedule's last factor everywhere.
            Adafactor(),
            optax.adafactor(PEAK, min_dim_size_to_factor=2, weight_decay_rate=PEAK * DECAY),
            (1.0,) * 5,
        ),
        (
            Muon(adam_rate=1.0),
            optax.partition(
                {
                    True: contrib.muon(rate, weight_decay=DECAY),
                    False: optax.adamw(rate, b2=0.95, weight_decay=DECAY),
                },
                is_matrix,
            ),
            FACTORS,
        ),
        (
            ScheduleFree(),
            contrib.schedule_free_adamw(PEAK, b1=0.9, b2=0.95, weight_decay=DECAY),
            (1.0,) * 5,
        ),
    ],
    ids=["adamw", "lion", "adafactor", "muon", "schedule-free"],
)
def test_where_every_multiplier_is_1_it_is_optaxs_own(config, theirs, factors):
    start, found, _ = trained(replace(MODEL, dim_model_base=MODEL.width), config, factors)
    expected = with_optax(optax.chain(optax.clip_by_global_norm(CLIP), theirs), start, factors)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_every_optimizer_of_the_configuration_has_a_rule():
    assert set(RULES) == set(OptimizerConfig.get_known_choices().values())
