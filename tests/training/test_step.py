"""The step against the formulas: accumulation, z-loss, norms, batches that are not finite, one program."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import flat, specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, Config, ModelConfig
from cpmjax.run.optimizers import AdamW
from cpmjax.run.schedule import WSD
from cpmjax.training.optimizer import make_optimizer
from cpmjax.training.origin import Origin
from cpmjax.training.state import TrainState
from cpmjax.training.step import Rates, make_step, next_token_loss
from cpmjax.training.timeline import Timeline

MODEL = ModelConfig(vocabulary=61, width=16, layers=2, heads=2, feed_forward=40, dim_model_base=8, tied=False)
ROWS, LENGTH = 8, 12
RATES = Rates(np.float32(0.01), np.float32(0.001))
ADAMW = make_optimizer(MODEL, AdamW())
# Adam's first update is g / (|g| + epsilon): with a small epsilon the rounding of a gradient near 0, which differs from
# processor to processor, decides an update of full size. This one has no such entries.
WELL_CONDITIONED = make_optimizer(MODEL, AdamW(epsilon=1e-4))

# Leaves the parameters alone and keeps the gradient as its state.
GRADIENT_KEEPER = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None, **_: (jax.tree.map(jnp.zeros_like, grads), grads),
)


def make_batch(seed: int = 0) -> dict[str, jax.Array]:
    """Two documents a row, and weights that differ from row to row, so that no two micro-batches weigh the same."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, MODEL.vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = random.uniform(0, 1, (ROWS, LENGTH)) * np.arange(ROWS)[:, None]
    places = np.arange(LENGTH)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.where(places < 5, places, places - 5), (ROWS, LENGTH)).astype(np.int32),
        "segments": np.broadcast_to(np.where(places < 5, 1, 2), (ROWS, LENGTH)).astype(np.int32),
        "weights": weights.astype(np.float32),
    }
    return {name: jnp.asarray(values) for name, values in batch.items()}


@functools.cache
def make_state(optimizer: optax.GradientTransformationExtraArgs) -> TrainState:
    def make() -> TrainState:
        parameters = initialise(MODEL, jax.random.key(0))
        return TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32))

    return jax.jit(make)()


@functools.cache
def jitted_step(optimizer, accumulation: int = 1, z_loss: float = 0.0):
    """Compiled once for all tests that ask for the same."""
    loss = next_token_loss(MODEL, ComputeConfig(), z_loss)
    return jax.jit(make_step(MODEL, loss, optimizer, accumulation))


def mean_by_formula(value_of_logits, parameters, batch) -> jax.Array:
    """The weighted mean over a batch of a value of each token's logits, all logits at once."""
    logits = MiniCPM(MODEL, parameters)(batch["tokens"], batch["positions"], batch["segments"])
    return jnp.sum(batch["weights"] * value_of_logits(logits, batch["targets"])) / jnp.sum(batch["weights"])


def cross_entropy(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def squared_logsumexp(logits, targets):
    return jax.nn.logsumexp(logits, axis=-1) ** 2


def assert_close(ours, theirs, **tolerance) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), err_msg=str(path), **tolerance)


def assert_equal(ours, theirs) -> None:
    assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_is_the_large_batch(accumulation):
    batch = make_batch()
    per_micro_batch = np.asarray(batch["weights"]).reshape(-1, accumulation, LENGTH).sum(axis=(0, 2))
    assert per_micro_batch.max() > 1.2 * per_micro_batch.min()  # else a mean of means would pass
    before = make_state(WELL_CONDITIONED)
    large, large_metrics = jitted_step(WELL_CONDITIONED)(before, batch, RATES)
    small, small_metrics = jitted_step(WELL_CONDITIONED, accumulation)(before, batch, RATES)
    assert not np.array_equal(before.trainable["embedding"], large.trainable["embedding"])
    assert_close(small.trainable, large.trainable, rtol=0, atol=1e-6)
    assert_close(small.optimizer, large.optimizer, rtol=0, atol=1e-6)
    assert float(small_metrics["loss"]) == pytest.approx(float(large_metrics["loss"]), abs=1e-6)
    assert float(small_metrics["grad_norm"]) == pytest.approx(float(large_metrics["grad_norm"]), abs=1e-6)


def test_loss_and_gradient_are_those_of_the_weighted_mean():
    batch, state = make_batch(), make_state(GRADIENT_KEEPER)
    by_formula = jax.jit(jax.value_and_grad(functools.partial(mean_by_formula, cross_entropy)))
    loss, gradient = by_formula(state.trainable, batch)
    after, metrics = jitted_step(GRADIENT_KEEPER)(state, batch, RATES)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert_close(after.optimizer, gradient, rtol=1e-4, atol=1e-7)


def test_z_loss_is_in_the_gradient_and_not_in_the_reported_loss():
    z_loss = 0.1
    batch, state = make_batch(), make_state(GRADIENT_KEEPER)
    without, plain_metrics = jitted_step(GRADIENT_KEEPER)(state, batch, RATES)
    after, metrics = jitted_step(GRADIENT_KEEPER, z_loss=z_loss)(state, batch, RATES)
    assert float(metrics["loss"]) == float(plain_metrics["loss"])
    expected = jax.jit(jax.grad(functools.partial(mean_by_formula, squared_logsumexp)))(state.trainable, batch)
    added = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / z_loss, after.optimizer, without.optimizer)
    assert max(np.abs(values).max() for values in jax.tree.leaves(expected)) > 0.01
    assert_close(added, expected, rtol=1e-3, atol=2e-5)


def test_the_gradient_is_the_slope_of_the_loss():
    """Along a random direction, by central differences; the loss is evaluated in float32, which limits the digits."""
    batch, state = make_batch(), make_state(GRADIENT_KEEPER)
    gradient = jitted_step(GRADIENT_KEEPER)(state, batch, RATES)[0].optimizer
    step = jitted_step(GRADIENT_KEEPER)
    random = np.random.default_rng(5)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), state.trainable)

    def loss(distance: float) -> float:
        moved = jax.tree.map(lambda x, d: np.asarray(x) + np.float32(distance) * d, state.trainable, direction)
        return float(step(replace(state, trainable=moved), batch, RATES)[1]["loss"])

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    products = jax.tree.map(lambda g, d: float(np.sum(np.asarray(g, np.float64) * d)), gradient, direction)
    assert slope == pytest.approx(sum(jax.tree.leaves(products)), rel=2e-2)


def with_nan_weight(batch):
    return batch | {"weights": batch["weights"].at[3, 2].set(jnp.nan)}


@pytest.mark.smoke
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_batch_changes_only_the_count_of_skipped_steps(accumulation):
    step = jitted_step(ADAMW, accumulation)
    before, _ = step(make_state(ADAMW), make_batch(0), RATES)
    skipped, metrics = step(before, with_nan_weight(make_batch(1)), RATES)
    assert np.isnan(float(metrics["loss"])) and float(metrics["skipped"]) == 1
    assert_equal((skipped.trainable, skipped.optimizer), (before.trainable, before.optimizer))
    after, metrics = step(skipped, make_batch(2), RATES)
    undisturbed, _ = step(before, make_batch(2), RATES)
    assert_equal((after.trainable, after.optimizer), (undisturbed.trainable, undisturbed.optimizer))
    assert float(metrics["skipped"]) == int(after.skipped) == 1


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    def loss(parameters, batch):
        value = jnp.sqrt(jnp.sum(parameters["final_norm"] - 1))  # 0, with an infinite slope
        return value, {"loss": value}

    before = make_state(ADAMW)
    after, metrics = jax.jit(make_step(MODEL, loss, ADAMW, 1))(before, make_batch(), RATES)
    assert float(metrics["loss"]) == 0 and not np.isfinite(float(metrics["grad_norm"]))
    assert_equal((after.trainable, after.optimizer), (before.trainable, before.optimizer))
    assert int(after.skipped) == 1


def norms_by_hand(tree) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, spec in flat(specs(MODEL)).items():
        values = np.asarray(flat(tree)[name], np.float64)
        squares[spec.role] = squares.get(spec.role, 0.0) + float((values**2).sum())
    return {role: square**0.5 for role, square in squares.items()}


def test_norms_of_each_class_and_size_of_the_logits():
    batch, state = make_batch(), make_state(ADAMW)
    gradient = jitted_step(GRADIENT_KEEPER)(make_state(GRADIENT_KEEPER), batch, RATES)[0].optimizer
    after, metrics = jitted_step(ADAMW)(state, batch, RATES)
    norms = norms_by_hand(gradient)
    assert norms.keys() == {"embedding", "head", "matrix", "norm"}
    for role, norm in norms.items():
        assert float(metrics[f"grad_norm/{role}"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-5)
    moved = jax.tree.map(
        lambda new, old: np.asarray(new, np.float64) - np.asarray(old), after.trainable, state.trainable
    )
    for role, norm in norms_by_hand(moved).items():
        assert float(metrics[f"update_norm/{role}"]) == pytest.approx(norm, rel=1e-4)
    size = mean_by_formula(lambda logits, _: jnp.sqrt(jnp.mean(logits**2, axis=-1)), state.trainable, batch)
    assert float(metrics["logit_rms"]) == pytest.approx(float(size), rel=1e-5)


def test_one_program_for_every_rate():
    timeline = Timeline(Config(schedule=WSD(warmup=2, stable=2, decay=3)), Origin({}))
    step = jitted_step(ADAMW)
    state, rates = make_state(ADAMW), [timeline.rates(number) for number in range(1, timeline.total + 1)]
    assert len({float(each.learning_rate) for each in rates}) >= 5
    for each in rates:
        state, _ = step(state, make_batch(), each)
    assert step._cache_size() == 1
