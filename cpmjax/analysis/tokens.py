"""Loss token by token: which tokens own a drop of the loss, and what a model can recite.

A share is the drop summed over the tokens of a class, over the drop summed over all: in float64, so that the shares of
classes that exclude each other sum to one. Classes are arrays int [B, L] of indices into a list of names.

B rows, L tokens a row, C classes, V vocabulary.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.analysis.excerpts import parts
from cpmjax.analysis.rows import bootstrap
from cpmjax.data.batches import Batch
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.loss import batch_losses
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.errors import UserError


@jax.jit
def _losses(model: MiniCPM, batch: dict[str, Any]) -> jax.Array:
    return batch_losses(model, batch).loss


def losses_by_token(model: MiniCPM, batch: Batch, rows: int = 8) -> np.ndarray:
    """float32 [B, L]: nats of each target, `rows` rows at a time. Compiles once a shape."""
    return np.concatenate([np.asarray(_losses(model, part)) for part in parts(batch, rows)])


# Who owns the drop.


@dataclass(frozen=True)
class Shares:
    """A drop of the loss by class; arrays float64 [C]. Classes without a token have a mean of NaN and no share."""

    names: list[str]
    tokens: np.ndarray  # weighted tokens in each class
    before: np.ndarray  # nats, summed
    after: np.ndarray
    low: np.ndarray  # between these `share` lies for 95 of 100 other samples of the rows
    high: np.ndarray

    @property
    def drop(self) -> np.ndarray:
        """Nats, summed; the sum over classes is that of the batch."""
        return self.before - self.after

    @property
    def share(self) -> np.ndarray:
        """Of the whole drop; sums to 1."""
        return self.drop / self.drop.sum()

    @property
    def mean_drop(self) -> np.ndarray:
        """Nats a token."""
        with np.errstate(invalid="ignore"):
            return self.drop / self.tokens

    def __str__(self) -> str:
        head = f"{'':22}  share of tokens  nats a token, before  drop a token  share of the drop"
        share_of_tokens = self.tokens / self.tokens.sum()
        lines = [
            f"{name:22}  {share_of_tokens[i]:15.1%}  {self.before[i] / self.tokens[i]:20.3f}  "
            f"{self.mean_drop[i]:12.4f}  {self.share[i]:7.1%} [{self.low[i]:.1%}, {self.high[i]:.1%}]"
            for i, name in enumerate(self.names)
            if self.tokens[i]
        ]
        return "\n".join([head, *lines])


def shares(
    before_BL: np.ndarray, after_BL: np.ndarray, weights_BL: np.ndarray, classes_BL: np.ndarray, names: list[str]
) -> Shares:
    """A drop from one loss of each token to another, divided among classes."""
    nats = [np.asarray(losses_BL, np.float64) * weights_BL for losses_BL in (before_BL, after_BL)]
    each_BLC = classes_BL[..., None] == np.arange(len(names))
    tokens_CB, before_CB, after_CB = (
        np.einsum("bl,blc->cb", np.asarray(values_BL, np.float64), each_BLC) for values_BL in (weights_BL, *nats)
    )
    found = bootstrap(lambda drop: drop / drop.sum(axis=0), before_CB - after_CB)
    return Shares(names, tokens_CB.sum(1), before_CB.sum(1), after_CB.sum(1), found.low, found.high)


def token_counts(batch: Batch, vocabulary: int) -> np.ndarray:
    """int64 [V]: how often each token is a target; of training rows, what a model could count."""
    return np.bincount(batch["targets"][batch["weights"] > 0], minlength=vocabulary)


FREQUENCY = ["rarest tenth", *(f"tenth {i}" for i in range(2, 10)), "most frequent tenth"]


def by_frequency(batch: Batch, counts_V: np.ndarray) -> np.ndarray:
    """Tenths of the text from its rarest tokens to its most frequent ones, as `counts_V` has it, by target.

    A token is in one tenth, the one that the middle of its own share falls into; where a frequent one is more than a
    tenth of the text, others are empty.
    """
    order = np.argsort(counts_V, kind="stable")
    middles = np.empty(len(counts_V))
    middles[order] = np.cumsum(counts_V[order]) - counts_V[order] / 2
    return np.minimum(middles * 10 / counts_V.sum(), 9).astype(int)[batch["targets"]]


def by_position(batch: Batch) -> tuple[np.ndarray, list[str]]:
    """Positions in the document, as far as it is in the row: 0, 1, 2 to 3, 4 to 7, and so on -> classes, names."""
    classes = np.ceil(np.log2(batch["positions"] + 1.0)).astype(int)
    ends = 2 ** np.arange(1, classes.max())
    return classes, ["0", "1", *(f"{end} to {2 * end - 1}" for end in ends)][: classes.max() + 1]


COPYABLE = ["new", "seen before", "seen after this token"]


def by_copy(batch: Batch) -> np.ndarray:
    """Whether the target stood before in its segment, and whether there after the same token as now.

    What stands after the same token again is what an induction head could copy.
    """
    found = np.empty(batch["tokens"].shape, int)
    for row, (tokens, targets, segments) in enumerate(
        zip(batch["tokens"], batch["targets"], batch["segments"], strict=True)
    ):
        seen: set[tuple[int, ...]] = set()
        for place, (token, target, segment) in enumerate(
            zip(tokens.tolist(), targets.tolist(), segments.tolist(), strict=True)
        ):
            seen.add((segment, token))
            found[row, place] = 2 if (segment, token, target) in seen else int((segment, target) in seen)
            seen.add((segment, token, target))
    return found


CHARACTERS = ["start of a word", "inside a word", "ideograph", "digit", "space", "punctuation", "byte", "control"]


def by_character(batch: Batch, tokenizer: Tokenizer) -> np.ndarray:
    """What kind of piece the target is, by its first character that is no space."""
    control = set(np.flatnonzero(tokenizer.byte_lengths() == 0)) | set(tokenizer.added_tokens.values())
    kinds = ["byte" if token in tokenizer.byte_values else "control" for token in range(tokenizer.vocabulary)]
    for token in set(range(tokenizer.vocabulary)) - control - set(tokenizer.byte_values):
        kinds[token] = _kind(tokenizer.decode_pieces([token]))
    return np.array([CHARACTERS.index(kind) for kind in kinds])[batch["targets"]]


def _kind(text: str) -> str:
    word = text.lstrip()
    if not word:
        return "space"
    category = unicodedata.category(word[0])
    if category == "Lo" and "CJK" in unicodedata.name(word[0], ""):
        return "ideograph"
    if category[0] in "LM" or word[0] == "_":
        return "inside a word" if word == text else "start of a word"
    return "digit" if category[0] == "N" else "punctuation"


# What it can recite.


def windows(batch: Batch, length: int) -> np.ndarray:
    """int32 [W, length]: the stretches of a batch, end to end, that lie within one document each."""
    rows, whole = batch["tokens"].shape[0], batch["tokens"].shape[1] // length * length
    if not whole:
        raise UserError(f"windows of {length} tokens; expected at most {batch['tokens'].shape[1]}, those of a row")
    tokens, segments = (batch[key][:, :whole].reshape(rows * whole // length, length) for key in ("tokens", "segments"))
    return tokens[(segments[:, 0] > 0) & (segments[:, 0] == segments[:, -1])]


@dataclass(frozen=True)
class Recital:
    """Of windows cut into a prompt and its continuation of k tokens, given the true tokens up to each."""

    right: np.ndarray  # bool [W, k]: the most probable token is the true one
    loss: np.ndarray  # float32 [W]: nats of the continuation, summed

    @property
    def extractable(self) -> np.ndarray:
        """bool [W]: the greedy continuation of the prompt is the true one, all of it (Carlini et al. 2023)."""
        return np.all(self.right, axis=1)


def recite(model: MiniCPM, windows_WL: np.ndarray, prompt: int = 32, rows: int = 8) -> Recital:
    """One pass over windows of L tokens, the first `prompt` of them the prompt, `rows` windows at a time.

    Greedy decoding goes right as long as each most probable token is the true one, so that one pass with the true
    tokens tells whether all are; where two tokens are equally probable the sampler may choose the other one.
    """
    if not 0 < prompt < windows_WL.shape[1]:
        raise UserError(f"prompt = {prompt}; expected 1 to {windows_WL.shape[1] - 1}, less than a window")
    found = [_recite(model, part["tokens"], prompt) for part in parts({"tokens": windows_WL}, rows)]
    right, loss = (np.concatenate([np.asarray(part[i]) for part in found]) for i in range(2))
    return Recital(right, loss)


@partial(jax.jit, static_argnames="prompt")
def _recite(model: MiniCPM, tokens_BL: jax.Array, prompt: int) -> tuple[jax.Array, jax.Array]:
    tokens_BL = jnp.asarray(tokens_BL)
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    final_BLD, _ = model.trunk(model.embed(tokens_BL), positions_BL, jnp.ones_like(tokens_BL))
    logits_BkV = model.head(final_BLD[:, prompt - 1 : -1])
    true_Bk = tokens_BL[:, prompt:]
    chosen_Bk = jnp.take_along_axis(logits_BkV, true_Bk[..., None], axis=-1)[..., 0]
    return jnp.argmax(logits_BkV, axis=-1) == true_Bk, jnp.sum(jax.nn.logsumexp(logits_BkV, axis=-1) - chosen_Bk, 1)


def exposure(losses: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bits by which a text is more probable than texts like it: log2(R) - log2(rank) among the R = others + 1.

    (Carlini et al. 2019.) `losses` any shape, `others` [R - 1]. A text that was never trained on has a rank like any
    other: its median exposure is 1, its mean `expected_exposure`.
    """
    ranks = 1 + np.searchsorted(np.sort(others), losses, side="left")
    return np.log2(len(others) + 1) - np.log2(ranks)


def expected_exposure(others: int) -> float:
    """Of a text that was never trained on, among so many others: log2(e) = 1.44 where they are many."""
    ranks = np.arange(1, others + 2)
    return float(np.log2(others + 1) - np.log2(ranks).mean())
