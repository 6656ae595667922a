"""Scores of heads: on an induction head made by hand, on heads that look everywhere, against the model's attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax import UserError
from cpmjax.analysis.circuits import (
    PATTERNS,
    head_scores,
    head_weights,
    in_context,
    over_heads,
    prefix_matching,
    previous_token,
    repeated_blocks,
)
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ModelConfig

CONFIG = ModelConfig(vocabulary=61, width=32, layers=2, heads=4, kv_heads=2, feed_forward=48, dim_model_base=8)

# By hand: 16 tokens. The residual stream holds a token's code, a constant, and the code of the token before.
CODE, CONSTANT, BEFORE, WIDTH, HEAD = slice(0, 16), 16, slice(17, 33), 33, 18
TURNING = [0, HEAD // 2]  # the pair of a head that rotary embeddings turn by 1 radian a token
STILL = [i for i in range(HEAD) if i not in TURNING]  # the others hardly turn at all: their base is enormous
INDUCTION = ModelConfig(
    vocabulary=16, width=WIDTH, layers=2, heads=2, kv_heads=1, head_width=HEAD, feed_forward=4, dim_model_base=WIDTH,
    scale_emb=1.0, scale_depth=2**0.5, rope_theta=5e22,
)  # fmt: skip


def model():
    return MiniCPM(CONFIG, jax.jit(initialise, static_argnums=0)(CONFIG, jax.random.key(0)))


def induction_model():
    """Two layers with one key-value head: head 0 of the first looks at the token before and hands its code on; head 1
    of the second looks for a token whose predecessor is the one it stands on. The other heads ask for nothing."""
    layers = {
        name: np.zeros((2, *shape), np.float32)
        for name, shape in {
            "query": (WIDTH, 2, HEAD), "key": (WIDTH, HEAD), "value": (WIDTH, HEAD), "output": (2, HEAD, WIDTH),
            "gate": (WIDTH, 4), "up": (WIDTH, 4), "down": (4, WIDTH),
        }.items()
    }  # fmt: skip
    strong = 100.0
    # A query turned back by 1 radian meets the key one place before it head on.
    layers["query"][0, CONSTANT, 0, TURNING] = strong * np.cos(1), -strong * np.sin(1)
    layers["key"][0, CONSTANT, TURNING[0]] = strong
    layers["value"][0, CODE, STILL] = layers["output"][0, 0, STILL, BEFORE] = np.eye(16)
    layers["query"][1, CODE, 1, STILL] = layers["key"][1, BEFORE, STILL] = 10 * np.eye(16)
    norms = {name: np.ones((2, WIDTH), np.float32) for name in ("attention_norm", "feed_forward_norm")}
    embedding = np.zeros((16, WIDTH), np.float32)
    embedding[:, CODE], embedding[:, CONSTANT] = np.eye(16), 1
    layers["query"] = layers["query"].reshape(2, WIDTH, -1)
    layers["output"] = layers["output"].reshape(2, -1, WIDTH)
    tree = {"embedding": embedding, "layers": layers | norms, "final_norm": np.ones(WIDTH, np.float32)}
    return MiniCPM(INDUCTION, jax.tree.map(jnp.asarray, tree))


def packed(rows=3, length=24, seed=0, vocabulary=6):
    """Two documents a row and some padding, of few tokens, so that they repeat."""
    text = np.random.default_rng(seed).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    segments = np.broadcast_to(np.r_[np.full(10, 1), np.full(length - 14, 2), np.zeros(4, int)], (rows, length))
    positions = np.broadcast_to(np.r_[np.arange(10), np.arange(length - 14), np.zeros(4, int)], (rows, length))
    return {
        "tokens": text[:, :-1], "targets": text[:, 1:], "positions": positions.astype(np.int32),
        "segments": segments.astype(np.int32), "weights": (segments > 0).astype(np.float32),
    }  # fmt: skip


def test_an_induction_head_made_by_hand_is_found():
    scores = head_scores(induction_model(), repeated_blocks(range(1, 16), first=0, rows=6, block=12), rows=4)
    before, induction = scores["previous token"], scores["prefix matching"]
    assert before.mean[0, 0] > 0.9 and induction.mean[1, 1] > 0.9
    others = np.ones((2, 2), bool)
    others[0, 0] = False
    assert (before.mean[others] < 0.2).all()
    others[0, 0], others[1, 1] = True, False
    assert (induction.mean[others] < 0.2).all()
    # What the heads that ask for nothing give is the floor: 1 / (i + 1) for each query i.
    assert before.mean[0, 1] == pytest.approx(before.floor, abs=1e-6)
    assert induction.mean[1, 0] == pytest.approx(induction.floor, abs=1e-6)
    assert before.floor == pytest.approx(np.mean([1 / (i + 1) for i in range(1, 24)]))
    assert induction.floor == pytest.approx(np.mean([1 / (i + 1) for i in range(13, 24)]))
    found = induction.interval()
    np.testing.assert_allclose(found.value, induction.mean)
    assert (found.low <= found.value + 1e-9).all() and (found.value <= found.high + 1e-9).all()


def test_attention_from_taps_is_the_models_own():
    """Grouped heads, two documents a row: weights times values, through the output, are the tapped branch."""
    this, rows = model(), packed()
    taps = ("query", "key", "value", "attention")
    _, tapped = this(rows["tokens"], rows["positions"], rows["segments"], taps=taps)
    weights = over_heads(tapped["query"], tapped["key"], rows["segments"], lambda weights_BLL: weights_BLL)
    assert weights.shape == (2, 4, 3, 24, 24)
    for layer in range(2):
        values = np.repeat(tapped["value"][layer], 2, axis=2)  # [B, L, H, K]: head h reads key-value head h // 2
        mixed = np.einsum("hbij,bjhk->bihk", weights[layer], values)
        branch = mixed.reshape(3, 24, -1) @ np.asarray(this.parameters["layers"]["output"][layer])
        real = rows["segments"] > 0
        np.testing.assert_allclose(branch[real], tapped["attention"][layer][real], atol=1e-4)


def test_rows_of_attention_sum_to_one():
    this, rows = model(), packed()
    _, tapped = this(rows["tokens"], rows["positions"], rows["segments"], taps=("query", "key"))
    weights = over_heads(tapped["query"], tapped["key"], rows["segments"], lambda weights_BLL: weights_BLL)
    np.testing.assert_allclose(weights.sum((1, -1)), CONFIG.heads, atol=1e-5)
    assert not np.triu(weights, 1).any()
    assert not np.asarray(weights)[..., 10:20, :10].any()  # the second document does not see the first


def test_attention_that_asks_for_nothing_is_uniform():
    weights = head_weights(jnp.zeros((2, 9, 4)), jnp.ones((2, 9, 4)), jnp.ones((2, 9), jnp.int32))
    np.testing.assert_allclose(weights[:, :, 0], np.broadcast_to(1 / np.arange(1, 10), (2, 9)), atol=1e-7)


def test_patterns_are_those_of_the_definition():
    rows = packed()
    tokens, segments = rows["tokens"], rows["segments"]
    before, matching = np.asarray(previous_token(rows)), np.asarray(prefix_matching(rows))
    for row in range(3):
        for i in range(20):
            for j in range(20):
                together = segments[row, i] == segments[row, j]
                assert before[row, i, j] == (j == i - 1 and together)
                follows = (
                    0 < j <= i and tokens[row, j - 1] == tokens[row, i] and segments[row, j - 1] == segments[row, j]
                )
                assert matching[row, i, j] == (follows and together)
    assert matching[:, :20, :20].sum() > 50


def test_prefix_matching_in_a_repeated_block_is_its_diagonal():
    """The key T - 1 places before the query (Olsson et al. 2022, appendix), of queries in the second copy only."""
    block = 12
    rows = repeated_blocks(range(1, 16), first=0, rows=4, block=block)
    i, j = np.meshgrid(np.arange(2 * block), np.arange(2 * block), indexing="ij")
    expected = (j == i - block + 1) & (i > block)
    np.testing.assert_array_equal(prefix_matching(rows), np.broadcast_to(expected, (4, *expected.shape)))
    assert (rows["tokens"][:, 0] == 0).all()
    np.testing.assert_array_equal(rows["targets"][:, :block], rows["targets"][:, block:])
    np.testing.assert_array_equal(rows["tokens"][:, 1:], rows["targets"][:, :-1])


def test_a_block_needs_tokens_to_draw_from():
    with pytest.raises(UserError, match="block = 16; expected at most 15"):
        repeated_blocks(range(1, 16), first=0, rows=1, block=16)


def test_rows_at_a_time_change_nothing():
    this, rows = model(), packed(rows=5)
    whole, parts = head_scores(this, rows, rows=5), head_scores(this, rows, rows=2)
    for name in PATTERNS:
        np.testing.assert_allclose(whole[name].mean, parts[name].mean, atol=1e-6)
        assert whole[name].queries_B.sum() == np.asarray(PATTERNS[name](rows))[:, :20].any(-1).sum()


def test_the_in_context_score_is_late_less_early():
    rows = packed()
    losses = np.where(rows["positions"] >= 5, 1.0, 3.0).astype(np.float32)
    losses[:, 20:] = 100  # padding
    found = in_context(losses, rows, early=(0, 5), late=(5, 10))
    assert (found.value, found.low, found.high) == pytest.approx((-2, -2, -2))
    assert in_context(losses, rows, early=(4, 6), late=(6, 10)).value == pytest.approx(-1)
    with pytest.raises(UserError, match="positions 50 to 60: no token"):
        in_context(losses, rows, early=(0, 5), late=(50, 60))
