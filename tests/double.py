"""The model in float64: derivatives are compared with finite differences, which are useless in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.derivatives import Loss
from cpmjax.model.initialise import initialise
from cpmjax.run.config import ComputeConfig, ModelConfig

LENGTH = 160  # attention goes by chunks of 128 queries, the loss by chunks of 64 tokens
CONFIG = ModelConfig(vocabulary=48, width=16, layers=2, heads=4, kv_heads=2, feed_forward=24, dim_model_base=8)
SINGLE = Loss(CONFIG, ComputeConfig(attention="chunked", remat="none", loss_chunk=64))
DOUBLE = Loss(CONFIG, ComputeConfig(dtype="float64", attention="chunked", remat="none", loss_chunk=64))  # type: ignore[arg-type]


@contextlib.contextmanager
def double() -> Iterator[None]:
    """What the model computes in float32 by name (norms, softmax, rotary angles, loss) is then float64."""
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        yield


def point(seed: int, dtype: type = np.float64) -> dict:
    """Parameters in general position: gains, too, differ from one another."""
    start = initialise(CONFIG, jax.random.key(seed))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.02 * draw.normal(size=x.shape), dtype), start)


def direction(seed: int, like: dict) -> dict:
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), like)


def batches(count: int, rows: int = 2, seed: int = 0, dtype: type = np.float64) -> dict:
    """[count, rows, LENGTH]: two documents a row, some tokens that do not count."""
    draw = np.random.default_rng(seed)
    shape = (count, rows, LENGTH)
    tokens = draw.integers(0, CONFIG.vocabulary, shape)
    place = np.broadcast_to(np.arange(LENGTH), shape)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": ((tokens * 7 + 3) % CONFIG.vocabulary).astype(np.int32),
        "positions": (place % 70).astype(np.int32),
        "segments": (1 + place // 70).astype(np.int32),
        "weights": (draw.random(shape) < 0.8).astype(dtype),
    }
