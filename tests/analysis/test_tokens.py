"""Who owns a drop of the loss, what is recited, and the rows that tell it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jobs
import numpy as np
import pytest

import cpmjax
from cpmjax import Sampler, UserError
from cpmjax.analysis import tokens as study
from cpmjax.analysis.excerpts import parts, rows_read, spread
from cpmjax.analysis.text import nats_to_bits_per_byte
from cpmjax.data import tokenizer as tokenizers
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.initialise import initialise
from cpmjax.model.loss import mean_loss
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ModelConfig

CONFIG = ModelConfig(vocabulary=61, width=32, layers=2, heads=4, kv_heads=2, feed_forward=48, dim_model_base=8)
WORDS = ["def f(x):\n", "    return x_1 + 20\n", "the rows of the text ", "中文文本 ", "über ", "☃ "] * 9


def model(config=CONFIG, seed=0):
    return MiniCPM(config, jax.jit(initialise, static_argnums=0)(config, jax.random.key(seed)))


def packed(rows=4, length=24, seed=0, vocabulary=9):
    """Two documents a row and some padding, of few tokens, so that they repeat."""
    text = np.random.default_rng(seed).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    segments = np.tile(np.r_[np.full(10, 1), np.full(length - 14, 2), np.zeros(4, int)].astype(np.int32), (rows, 1))
    positions = np.tile(np.r_[np.arange(10), np.arange(length - 14), np.zeros(4, int)].astype(np.int32), (rows, 1))
    weights = (segments > 0).astype(np.float32)
    return dict(tokens=text[:, :-1], targets=text[:, 1:], positions=positions, segments=segments, weights=weights)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tokenizers.train(WORDS, 300, 10**6))


# Shares.


def every_classification(batch, tokenizer):
    counts = np.random.default_rng(1).integers(0, 50, tokenizer.vocabulary)
    return [
        (study.by_frequency(batch, counts), study.FREQUENCY),
        study.by_position(batch),
        (study.by_copy(batch), study.COPYABLE),
        (study.by_character(batch, tokenizer), study.CHARACTERS),
    ]


def test_shares_sum_to_the_total(tokenizer):
    """And so do tokens and losses: no token is lost, none counted twice."""
    batch, draw = packed(), np.random.default_rng(0)
    before = draw.gamma(2, 2, batch["tokens"].shape).astype(np.float32)
    after = before - draw.normal(0.1, 0.5, before.shape).astype(np.float32)
    total = (np.float64(before) - np.float64(after))[batch["weights"] > 0].sum()
    for classes, names in every_classification(batch, tokenizer):
        assert classes.min() >= 0 and classes.max() < len(names)
        found = study.shares(before, after, batch["weights"], classes, names)
        assert abs(found.drop.sum() - total) < 1e-12 * abs(total)
        assert abs(found.share.sum() - 1) < 1e-12
        assert found.tokens.sum() == batch["weights"].sum()
        assert (found.tokens > 0).sum() > 1
        for i in range(len(names)):
            chosen = (classes == i) & (batch["weights"] > 0)
            assert found.before[i] == pytest.approx(np.float64(before)[chosen].sum())
        assert all(name in str(found) for name, tokens in zip(names, found.tokens, strict=True) if tokens)


def test_the_mean_over_classes_is_the_loss_of_the_batch(tokenizer):
    batch, this = packed(), model()
    losses = study.losses_by_token(this, batch, rows=3)
    for classes, names in every_classification(batch, tokenizer):
        found = study.shares(losses, losses, batch["weights"], classes, names)
        some = found.tokens > 0
        means = found.before[some] / found.tokens[some]
        assert np.average(means, weights=found.tokens[some]) == pytest.approx(float(mean_loss(this, batch)), abs=1e-6)


def test_the_interval_of_a_share():
    """Rows that agree leave no doubt; rows that do not, some, and the share lies within."""
    classes, weights = np.tile([0, 0, 1], (40, 1)), np.ones((40, 3))
    same = study.shares(np.tile([1.0, 2, 1], (40, 1)), np.zeros((40, 3)), weights, classes, ["a", "b"])
    np.testing.assert_allclose([same.low, same.share, same.high], [[0.75, 0.25]] * 3)
    noisy = np.random.default_rng(0).gamma(2, 1, (40, 3))
    found = study.shares(noisy, np.zeros((40, 3)), weights, classes, ["a", "b"])
    assert (found.low < found.share).all() and (found.share < found.high).all()
    assert (found.high - found.low < 0.3).all()


# Classes.


def test_tenths_of_the_text_by_frequency():
    batch = {"targets": np.arange(10)[None]}
    np.testing.assert_array_equal(study.by_frequency(batch, np.full(10, 7)), [np.arange(10)])
    # Half of the text is token 3: its middle is at 75 %. Token 0 never came.
    classes = study.by_frequency({"targets": np.arange(4)[None]}, np.array([0, 10, 40, 50]))
    np.testing.assert_array_equal(classes, [[0, 0, 3, 7]])


def test_counts_are_of_weighted_targets():
    batch = packed()
    counts = study.token_counts(batch, 61)
    assert counts.shape == (61,) and counts.sum() == batch["weights"].sum()
    assert counts[3] == ((batch["targets"] == 3) & (batch["weights"] > 0)).sum()


def test_positions_in_powers_of_two():
    batch = {"positions": np.array([[0, 1, 2, 3, 4, 7, 8, 15]])}
    classes, names = study.by_position(batch)
    assert [names[i] for i in classes[0]] == ["0", "1", *["2 to 3"] * 2, *["4 to 7"] * 2, *["8 to 15"] * 2]


def test_copyable_by_the_definition():
    batch = packed(length=40)
    tokens, targets, segments = batch["tokens"], batch["targets"], batch["segments"]
    found = study.by_copy(batch)
    for row, place in itertools.product(range(4), range(40)):
        here = [j for j in range(place + 1) if segments[row, j] == segments[row, place]]
        seen = any(tokens[row, j] == targets[row, place] for j in here)
        pair = tokens[row, place], targets[row, place]
        again = any((tokens[row, j], tokens[row, j + 1]) == pair for j in here if j < place and j + 1 in here)
        assert study.COPYABLE[found[row, place]] == (
            "seen after this token" if again else "seen before" if seen else "new"
        )
    assert set(found[segments > 0]) == {0, 1, 2}


def test_kinds_of_pieces(tokenizer):
    expected = {"20": "digit", "中": "ideograph", "\n": "space", "+": "punctuation", "_": "inside a word"}
    for text, kind in expected.items():
        for token in tokenizer.encode(text):
            batch = {"targets": np.array([[token]])}
            if token not in tokenizer.byte_values:
                assert study.CHARACTERS[study.by_character(batch, tokenizer)[0, 0]] == kind
    kinds = [study.CHARACTERS[i] for i in study.by_character({"targets": np.arange(300)[None]}, tokenizer)[0]]
    assert kinds[tokenizer.bos] == kinds[tokenizer.eos] == "control"
    assert all(kinds[token] == "byte" for token in tokenizer.byte_values) and kinds.count("byte") == 256
    words = {tokenizer.decode_pieces([token]): kind for token, kind in enumerate(kinds)}
    assert words[" t"] == "start of a word" and words["he"] == "inside a word"


def test_bits_per_byte_do_not_depend_on_the_tokenizer(tokenizer, tmp_path):
    """One text and one cost of each of its bytes, log 256: 8 bits per byte in tokens of any size."""
    found = {}
    for name, one in {"large": tokenizer, "small": Tokenizer(tokenizers.train(WORDS, 290, 10**6))}.items():
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
        ids = np.array([one.encode("".join(WORDS))])
        losses = np.log(256) * one.byte_lengths()[ids]
        batch = {"targets": ids, "weights": np.ones(ids.shape, np.float32)}
        nats = losses.mean()
        found[name] = nats, nats * nats_to_bits_per_byte(SimpleNamespace(path=tmp_path / name), batch)
    assert found["large"][0] > found["small"][0] * 1.01
    assert found["large"][1] == pytest.approx(8) and found["small"][1] == pytest.approx(8)


# Memorisation.


@pytest.mark.slow
def test_extractable_is_what_the_sampler_continues():
    """Windows that the sampler itself wrote, and the same with one token of the continuation changed."""
    config = replace(CONFIG, init_std=0.6)  # so that the most probable token leads by far
    this = model(config)
    prompts = np.random.default_rng(0).integers(3, 61, (6, 8)).tolist()
    samples = Sampler(this)(prompts, max_new_tokens=10, temperature=0, stop_ids=())
    written = np.array([sample.prompt + sample.tokens for sample in samples], np.int32)
    changed = written.copy()
    changed[np.arange(6), 8 + np.arange(6)] = (changed[np.arange(6), 8 + np.arange(6)] + 1) % 61
    found = study.recite(this, np.concatenate([written, changed]), prompt=8, rows=5)
    assert found.right.shape == (12, 10)
    assert found.extractable.tolist() == [True] * 6 + [False] * 6
    for row, sample in enumerate(samples):
        assert found.loss[row] == pytest.approx(-sum(sample.logprobs), abs=1e-3)
        assert not found.right[6 + row, row] and found.right[6 + row, :row].all()


def test_windows_stay_within_a_document():
    batch = packed(rows=3, length=26)  # documents of 10 and 12 tokens, then padding
    found = study.windows(batch, 5)
    assert found.shape == (3 * 4, 5)
    np.testing.assert_array_equal(found[:4], batch["tokens"][0, :20].reshape(4, 5))
    assert len(study.windows(batch, 8)) == 3  # the second one has both documents, the third ends in padding
    with pytest.raises(UserError, match="windows of 64 tokens; expected at most 26"):
        study.windows(batch, 64)
    with pytest.raises(UserError, match="prompt = 5; expected 1 to 4"):
        study.recite(model(), found, prompt=5)


def test_exposure_is_a_rank_in_bits():
    others = np.arange(1, 16, dtype=float)  # 15 of them
    np.testing.assert_allclose(study.exposure(np.array([0.5, 1.5, 99]), others), [4, 3, 0])
    assert study.exposure(np.array([2.0]), others) == 3  # as probable as another one: that is not above it


def test_a_canary_that_was_never_trained_has_the_expected_exposure():
    """It is one of them: median 1, mean 1.44, of many drawn with the others from one distribution."""
    draw = np.random.default_rng(0)
    canaries, others = draw.normal(size=20_000), draw.normal(size=4095)
    found = study.exposure(canaries, others)
    assert np.median(found) == pytest.approx(1, abs=0.1)
    assert found.mean() == pytest.approx(study.expected_exposure(4095), abs=0.1)
    assert study.expected_exposure(10**6) == pytest.approx(np.log2(np.e), abs=1e-4)
    assert study.exposure(canaries - 4, others).mean() > 8


# Steps and rows.


def test_a_few_steps_with_both_ends():
    assert spread([5, 10, 15, 20, 25], 3) == [5, 15, 25]
    assert spread([5, 10], 9) == [5, 10]


def test_parts_are_the_batch():
    batch = packed(rows=7)
    found = list(parts(batch, 3))
    assert [len(part["tokens"]) for part in found] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part["targets"] for part in found]), batch["targets"])


@pytest.mark.slow
def test_rows_read_are_those_the_run_trained_on(tmp_path_factory):
    """The loss that the log has of a step is that of its rows before the step; also of a branch, by its trunk."""
    folder = tmp_path_factory.mktemp("read")
    schedule = {"type": "wsd", "warmup": 2, "stable": 10, "decay": 0}
    jobs.train(jobs.experiment(folder, "runs/trunk", schedule=schedule, checkpoint={"every": 1}))
    series = cpmjax.Series(folder / "runs/trunk")
    size = series.config.training.batch_size
    every = rows_read(series, 12 * size, 12)
    logged = {record["step"]: record["loss"] for record in series.log()}
    for step in (4, 11):
        of_step = {key: values[step * size : (step + 1) * size] for key, values in every.items()}
        assert series.loss(step, of_step) == pytest.approx(logged[step + 1], abs=1e-5)
    with pytest.raises(UserError, match=f"{3 * size} rows were read up to step 3"):
        rows_read(series, 3 * size + 1, 3)
