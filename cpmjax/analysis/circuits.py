"""Circuits by what heads attend to: the token before, or what came after an earlier copy of this one; and what it buys.

The scores are those of Olsson et al. 2022 (In-context learning and induction heads). One head is looked at at a time:
of its weights [B, L, L] there is never more than that.

B rows, L tokens a row, H heads, G key-value heads, R = H / G, K head width, N layers, T tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.excerpts import parts
from cpmjax.analysis.rows import Interval, bootstrap
from cpmjax.data.batches import Batch
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.errors import UserError

# Attention.


def head_weights(query_BLK: jax.Array, key_BLK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """float32 [B, L, L]: where each query of one head looks. Nothing goes to later tokens or other documents."""
    scores_BLL = jnp.einsum("bik,bjk->bij", query_BLK, key_BLK, preferred_element_type=jnp.float32)
    scores_BLL = jnp.where(_visible(segments_BL), scores_BLL / math.sqrt(query_BLK.shape[-1]), -1e30)
    return jax.nn.softmax(scores_BLL, axis=-1)


def over_heads(
    query_NBLHK: jax.Array, key_NBLGK: jax.Array, segments_BL: jax.Array, score: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`score` of the weights [B, L, L] of each head, one after the other -> [N, H, ...].

    Query and key are as the model taps them, after rotation. Head h reads key-value head h // R.
    """
    layers, _, _, heads, _ = query_NBLHK.shape
    repeats = heads // key_NBLGK.shape[3]

    def one(index: jax.Array) -> jax.Array:
        layer, head = index // heads, index % heads
        query_BLK, key_BLK = query_NBLHK[layer, :, :, head], key_NBLGK[layer, :, :, head // repeats]
        return score(head_weights(query_BLK, key_BLK, segments_BL))

    found = jax.lax.map(one, jnp.arange(layers * heads))
    return found.reshape(layers, heads, *found.shape[1:])


# Patterns: the keys that a kind of head would look at, bool [B, L, L] by query and key.


def previous_token(batch: dict[str, Any]) -> jax.Array:
    """The token before, in the same document."""
    slots = jnp.arange(batch["tokens"].shape[1])
    return _visible(batch["segments"]) & (slots[:, None] - 1 == slots)


def prefix_matching(batch: dict[str, Any]) -> jax.Array:
    """Every token that came after an earlier copy of this one: what an induction head copies.

    In a random block that is repeated this is one key, the block's length less one before the query.
    """
    same_BLL = (batch["tokens"][:, :, None] == batch["tokens"][:, None, :]) & _visible(batch["segments"])
    earlier_BLL = same_BLL & ~jnp.eye(same_BLL.shape[1], dtype=bool)
    after_BLL = jnp.pad(earlier_BLL[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    return after_BLL & _visible(batch["segments"])


PATTERNS = {"previous token": previous_token, "prefix matching": prefix_matching}


def _visible(segments_BL: jax.Array) -> jax.Array:
    slots = jnp.arange(segments_BL.shape[1])
    return (segments_BL[:, :, None] == segments_BL[:, None, :]) & (slots[:, None] >= slots)


@dataclass(frozen=True)
class Scores:
    """How much of their attention the heads give to a pattern, by row: sums over the queries for which it has a key."""

    total_BNH: np.ndarray
    queries_B: np.ndarray
    floor_B: np.ndarray  # what attention that is the same everywhere, 1 / (i + 1), would give

    @property
    def mean(self) -> np.ndarray:
        """float64 [N, H], 0 to 1."""
        return self.total_BNH.sum(0) / self.queries_B.sum()

    @property
    def floor(self) -> float:
        return float(self.floor_B.sum() / self.queries_B.sum())

    def interval(self) -> Interval:
        """Of `mean`, each [N, H]."""
        return bootstrap(lambda given, queries: given / queries, np.moveaxis(self.total_BNH, 0, -1), self.queries_B)


def head_scores(model: MiniCPM, batch: Batch, rows: int = 8) -> dict[str, Scores]:
    """{pattern: Scores} of every head on a batch, `rows` rows at a time. Padding does not count as a query."""
    found = [jax.tree.map(np.asarray, _scores(model, part)) for part in parts(batch, rows)]
    return {
        name: Scores(*(np.concatenate([part[name][i] for part in found]).astype(np.float64) for i in range(3)))
        for name in PATTERNS
    }


@jax.jit
def _scores(model: MiniCPM, batch: dict[str, Any]) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    segments_BL = batch["segments"]
    x_BLD = model.embed(batch["tokens"])
    _, tapped = model.trunk(x_BLD, batch["positions"], segments_BL, ("query", "key"))
    seen_BL = _visible(segments_BL).sum(-1)
    found = {}
    for name, pattern in PATTERNS.items():
        keys_BLL = pattern(batch) & (segments_BL > 0)[:, :, None]
        given_NHB = over_heads(tapped["query"], tapped["key"], segments_BL, partial(jnp.einsum, "bij,bij->b", keys_BLL))
        queries_B = jnp.sum(keys_BLL.any(-1), axis=1)
        found[name] = jnp.moveaxis(given_NHB, 2, 0), queries_B, jnp.sum(keys_BLL.sum(-1) / seen_BL, axis=1)
    return found


# What it buys.


def repeated_blocks(candidates: Sequence[int], first: int, rows: int, block: int, seed: int = 0) -> Batch:
    """Rows of `first` (the begin of text) and a random block twice: a batch [rows, 2 * block].

    A block draws its tokens from `candidates` without replacement, so that nothing but the repetition tells what comes.
    Raises UserError where there are too few of them.
    """
    if len(candidates) < block:
        raise UserError(f"block = {block}; expected at most {len(candidates)}, the tokens there are to draw from")
    draw = np.random.default_rng(seed)
    blocks = np.stack([draw.choice(np.asarray(candidates), block, replace=False) for _ in range(rows)])
    text = np.column_stack([np.full(rows, first), blocks, blocks]).astype(np.int32)
    shape = rows, 2 * block
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "positions": np.broadcast_to(np.arange(2 * block, dtype=np.int32), shape),
        "segments": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def in_context(losses_BL: np.ndarray, batch: Batch, early: tuple[int, int], late: tuple[int, int]) -> Interval:
    """The in-context learning score: nats a token late in a document less early in it; below 0 where context helps.

    The windows are positions in the document, each from one up to another. Of `repeated_blocks`, early (0, T) and late
    (T + 1, 2 * T) are the block and its copy, without the token nobody can know. Losses may be differences of losses on
    the same text: their score is the difference of the scores. Raises UserError for a window without tokens.
    """
    totals = []
    for first, end in (late, early):
        counted_BL = batch["weights"] * (batch["positions"] >= first) * (batch["positions"] < end)
        if not counted_BL.any():
            raise UserError(f"positions {first} to {end}: no token of the batch; expected some in both windows")
        totals += [np.sum(losses_BL * counted_BL, axis=1, dtype=np.float64), counted_BL.sum(axis=1, dtype=np.float64)]
    return bootstrap(lambda late, of_late, early, of_early: late / of_late - early / of_early, *totals)
