"""What a study is said to cost: FLOPs against those that XLA counts in the compiled program, and what is printed."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from cpmjax.analysis import cost
from cpmjax.model.loss import mean_loss
from cpmjax.model.parameters import specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, Config, ModelConfig

LENGTH, ROWS = 256, 2
SERIES = SimpleNamespace(
    config=Config(model=ModelConfig(vocabulary=2048, width=256, layers=1, heads=4, feed_forward=640)),
    compute=ComputeConfig(attention="chunked", remat="none", loss_chunk=4096),
)


def loss_of(parameters, batch):
    return mean_loss(MiniCPM(SERIES.config.model, parameters, SERIES.compute), batch)


def hvp(parameters, batch):
    direction = jax.tree.map(jnp.sin, parameters)  # not equal to anything that is computed anyway
    return jax.jvp(lambda p: jax.grad(loss_of)(p, batch), (parameters,), (direction,))


@pytest.mark.parametrize(
    ("passes", "program"),
    [(1, loss_of), (cost.GRADIENT, jax.grad(loss_of)), (cost.HVP, hvp)],
    ids=["forward", "gradient", "hvp"],
)
def test_flops_are_those_that_the_compiler_counts(passes, program):
    config = SERIES.config.model
    parameters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs(config))
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    weights = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), ids) | {"weights": weights}
    counted = jax.jit(program).lower(parameters, batch).compile().cost_analysis()["flops"]
    expected = passes * cost.forward_flops(config, LENGTH) * ROWS * LENGTH
    # The compiler counts softmax and norms too, and all of a chunk of attention, of which the formula counts half.
    assert 0.9 * expected < counted < 1.35 * expected


def test_it_says_what_a_study_costs():
    said = cost.describe_cost(SERIES, 4096, forward=2, gradient=3, hvp=4)
    assert "2 forward passes, 3 gradients, 4 Hessian-vector products of 4,096 tokens" in said
    amount = (2 + 3 * 3 + 4 * 9) * 4096 * cost.forward_flops(SERIES.config.model, LENGTH)
    assert f"{amount / 1e9:.3g} GFLOP" in said
    assert re.search(r"about [\d.]+ s at the [\d.]+ [GT]FLOP/s of a forward pass of 2,048 tokens", said)
    assert len(said.splitlines()) == 2
    assert "gradients" not in cost.describe_cost(SERIES, 512, forward=1)
