"""Beam search against every continuation there is, and against a search in plain Python without a cache."""

from __future__ import annotations

import itertools
import math

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax import Sampler, UserError
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ModelConfig
from cpmjax.sampling import beam
from cpmjax.sampling.beam import BeamRequest, search, spread
from cpmjax.sampling.decode import prefill
from cpmjax.sampling.weights import decode_weights

VOCABULARY = 97


def make_model(vocabulary=VOCABULARY, sharpness=8.0, seed=3, context=128):
    """Sharp enough that hypotheses differ in more than the last bits, and blunt enough that they change places."""
    config = ModelConfig(
        vocabulary=vocabulary,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        feed_forward=80,
        dim_model_base=16,
        tied=False,
        context=context,
    )
    parameters = initialise(config, jax.random.key(seed))
    return MiniCPM(config, parameters | {"head": parameters["head"] * sharpness})


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plain_search(model, prompt, beams, limit, length_penalty, stop_ids):
    """-> [(tokens, log-probabilities, score)], best first. Always to the limit, the whole forward pass for a token."""
    forward = jax.jit(lambda tokens: model(tokens))
    live, finished = [([], [])], []
    for length in range(1, limit + 1):
        rows = np.zeros((beams, len(prompt) + limit), np.int32)
        for row, (tokens, _) in zip(rows, live, strict=False):
            row[: len(prompt) + length - 1] = [*prompt, *tokens]
        log = log_softmax(forward(rows)[:, len(prompt) + length - 2])
        continued = [
            ([*tokens, token], [*found, log[row, token]])
            for row, (tokens, found) in enumerate(live)
            for token in range(model.config.vocabulary)
        ]
        continued.sort(key=lambda hypothesis: -sum(hypothesis[1]))
        stopped = [hypothesis for hypothesis in continued[:beams] if hypothesis[0][-1] in stop_ids]
        live = [hypothesis for hypothesis in continued if hypothesis[0][-1] not in stop_ids][:beams]
        finished += stopped + (live if length == limit else [])
    scored = [(tokens, found, sum(found) / len(tokens) ** length_penalty) for tokens, found in finished]
    return sorted(scored, key=lambda hypothesis: -hypothesis[2])[:beams]


def check(found, expected, stop_ids):
    assert [sample.tokens for sample in found] == [tokens for tokens, _, _ in expected]
    scores = [sample.score for sample in found], [score for *_, score in expected]
    np.testing.assert_allclose(*scores, rtol=1e-6, atol=1e-5)
    for sample, (tokens, logprobs, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-5)
        assert sample.finish_reason == ("stop" if tokens[-1] in stop_ids else "length")


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_wide_enough_it_finds_the_best_of_all(length_penalty):
    """6 tokens, at most 4 places: 150 beams hold all continuations of up to 3, so that nothing is lost on the way."""
    model, prompt, stop, limit, beams = make_model(6, sharpness=4.0), [1, 5, 0], 2, 4, 150
    rows = np.asarray([[*prompt, *tokens] for tokens in itertools.product(range(6), repeat=limit)], np.int32)
    log = log_softmax(model(rows))[:, len(prompt) - 1 : -1]
    every = {}
    for tokens, found in zip(rows[:, len(prompt) :].tolist(), log, strict=True):
        count = tokens.index(stop) + 1 if stop in tokens else limit
        total = sum(found[place, tokens[place]] for place in range(count))
        every[tuple(tokens[:count])] = total / count**length_penalty
    assert len(every) == 1 + 5 + 25 + 125 + 625
    expected = sorted(every.items(), key=lambda item: -item[1])[:beams]
    assert {len(tokens) for tokens, _ in expected} >= {3, 4}
    (found,) = Sampler(model).beam_search(
        [prompt], beams=beams, max_new_tokens=limit, length_penalty=length_penalty, stop_ids=[stop]
    )
    assert [tuple(sample.tokens) for sample in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([sample.score for sample in found], [score for _, score in expected], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 4, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_as_a_plain_search(beams, length_penalty):
    """Prompts of other lengths, limits and stop ids together; one has far more stop ids than beams, and each twice."""
    model = make_model()
    prompts, limits = [[1, 20, 30], [7] * 5 + [9] * 12, [96]], [12, 7, 9]
    stop_ids = [[2], [], list(range(40)) * 2]
    found = Sampler(model).beam_search(
        prompts, beams=beams, max_new_tokens=limits, length_penalty=length_penalty, stop_ids=stop_ids
    )
    for row, (prompt, limit, stops) in enumerate(zip(prompts, limits, stop_ids, strict=True)):
        check(found[row], plain_search(model, prompt, beams, limit, length_penalty, stops), stops)


@pytest.mark.parametrize("name", ["minicpm-tiny-a", "minicpm-tiny-gqa"])
def test_the_golden_models_as_a_plain_search(name):
    model, numbers = golden_models.load(name), golden_models.expected(name)
    prompts = [numbers[f"greedy_prompt_{row}"].tolist() for row in range(3)]
    stops = [int(numbers["greedy_tokens_0"][4]), int(numbers["greedy_tokens_1"][2])]
    found = Sampler(model).beam_search(prompts, beams=3, max_new_tokens=10, stop_ids=stops)
    for samples, prompt in zip(found, prompts, strict=True):
        check(samples, plain_search(model, prompt, 3, 10, 1.0, stops), stops)
    assert any(sample.finish_reason == "stop" for samples in found for sample in samples)


def test_one_beam_is_greedy():
    """By probability alone: no hypothesis can then outdo one whose stop id was the most probable token."""
    model = make_model()
    sampler, prompts = Sampler(model), [[1, 20, 30], [5, 5], [60, 2, 9, 11]]
    (free,) = sampler(prompts[:1], temperature=0, max_new_tokens=12)
    asked = {"max_new_tokens": 12, "stop_ids": free.tokens[3:5]}
    greedy = sampler(prompts, temperature=0, **asked)
    assert {sample.finish_reason for sample in greedy} == {"stop", "length"}
    for (found,), expected in zip(
        sampler.beam_search(prompts, beams=1, length_penalty=0, **asked), greedy, strict=True
    ):
        assert (found.tokens, found.finish_reason) == (expected.tokens, expected.finish_reason)
        assert found.score == pytest.approx(sum(expected.logprobs), abs=1e-5)


def start(model, prompts, beams, new_tokens=16):
    tokens, lengths = np.zeros((len(prompts), 16), np.int32), [len(prompt) for prompt in prompts]
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    weights = decode_weights(model)
    state, _ = prefill(
        model.config, weights, tokens, jnp.asarray(lengths), new_tokens=new_tokens, cache_dtype="float32"
    )
    return weights, spread(state, beams=beams)


def test_ending_early_changes_nothing(monkeypatch):
    """64 prompts, of a blunt model whose hypotheses soon have no hope, and of a sharp one whose laggards often win."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCABULARY, length).tolist() for length in draw.integers(1, 6, 64)]
    limits = jnp.asarray(draw.integers(8, 17, 64))
    stop_ids = jnp.asarray(np.argsort(draw.random((64, VOCABULARY)))[:, :16])
    blunt, sharp = make_model(), make_model(sharpness=20.0)
    to_the_limit = jax.jit(lambda *arguments: search.__wrapped__(blunt.config, *arguments))
    for length_penalty in (-1.5, -0.5, 0.0, 0.3, 1.0, 1.5):
        for model in (blunt, sharp):
            request = BeamRequest(stop_ids, limits, jnp.float32(length_penalty))
            weights, state = start(model, prompts, beams=3)
            with monkeypatch.context() as patched:
                patched.setattr(beam, "_hopeless", lambda *_: jnp.zeros(len(prompts), bool))
                whole = to_the_limit(weights, state, request)
            early = search(model.config, weights, state, request)
            for found, expected in zip(early.finished, whole.finished, strict=True):
                np.testing.assert_array_equal(found, expected)
            assert whole.step == 16 and (early.step < 16 or model is sharp or length_penalty >= 1)


def test_a_prompt_does_not_know_of_the_others():
    model = make_model()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCABULARY, length).tolist() for length in draw.integers(1, 17, 11)]
    limits, stop_ids = draw.integers(1, 17, 11).tolist(), draw.integers(0, VOCABULARY, (11, 3)).tolist()
    sampler, split = Sampler(model), Sampler(model, max_batch=6)
    together = sampler.beam_search(prompts, beams=3, max_new_tokens=limits, stop_ids=stop_ids)
    parts = split.beam_search(prompts, beams=3, max_new_tokens=limits, stop_ids=stop_ids)
    for row, found in enumerate(together):
        (alone,) = sampler.beam_search(
            [prompts[row]], beams=3, max_new_tokens=limits[row], stop_ids=stop_ids[row][:1] + stop_ids[row]
        )
        for other in (alone, parts[row]):
            assert [sample.tokens for sample in other] == [sample.tokens for sample in found]
            np.testing.assert_allclose([one.score for one in other], [one.score for one in found], atol=1e-5)


def test_an_int8_cache_is_close():
    """The log-probabilities that it gives to what it finds against the model's own."""
    model = make_model()
    (found,) = Sampler(model, cache_dtype="int8").beam_search([[1, 20, 30]], beams=4, max_new_tokens=12, stop_ids=[5])
    for sample in found:
        log = log_softmax(model(np.asarray([[*sample.prompt, *sample.tokens]], np.int32))[0, 2:-1])
        error = np.abs(log[range(len(sample.tokens)), sample.tokens] - sample.logprobs)
        assert 0 < error.max() < 0.1


def test_no_more_compiles_after_the_first_of_each_shape():
    def count():
        return [function._cache_size() for function in (prefill, spread, search)]

    sampler = Sampler(make_model(context=112))

    def use(short, long, penalty, stop, beams=6):
        sampler.beam_search([[1] * short], beams=beams, max_new_tokens=20, length_penalty=penalty, stop_ids=[stop])
        sampler.beam_search([[1] * long, [2]], beams=beams, max_new_tokens=[3, 20], stop_ids=[[stop], [9, 4]])

    before = count()
    use(3, 20, 1, 7)
    warm = count()
    # One prompt of 16 with one stop id, two of 32 with two.
    assert np.subtract(warm, before).tolist() == [2, 2, 2]
    use(16, 32, -0.5, 8)
    Sampler(make_model(context=112, seed=4)).beam_search([[1, 2]], beams=6, max_new_tokens=30, stop_ids=())
    assert count() == warm
    use(3, 20, 1, 7, beams=7)
    assert np.subtract(count(), warm).tolist() == [0, 2, 2]


def test_the_state_is_moved_on_in_its_own_memory():
    """And in no more than its caches once again, whose rows take other places."""
    model = make_model()
    weights, state = start(model, [[1] * 9] * 4, beams=4, new_tokens=256)
    request = BeamRequest(jnp.full((4, 1), -1), jnp.full(4, 256), jnp.float32(1))
    used = search.lower(model.config, weights, state, request).compile().memory_analysis()
    assert used.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert used.temp_size_in_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers))


def test_what_there_is_not_is_not_returned():
    """Three tokens of which one stops: 1 + 2 hypotheses of one token."""
    (found,) = Sampler(make_model(3)).beam_search([[1]], beams=8, max_new_tokens=1, stop_ids=[0])
    assert sorted(sample.tokens[0] for sample in found) == [0, 1, 2]
    assert math.fsum(math.exp(sample.score) for sample in found) == pytest.approx(1, abs=1e-5)
    assert Sampler(make_model(3)).beam_search([]) == []


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"beams": 0}, "beams = 0; expected a positive whole number"),
        ({"beams": 2.0}, r"beams = 2\.0; expected a positive whole number"),
        ({"beams": True}, "beams = True; expected"),
        ({"beams": 9}, r"beams = 9; expected at most 8, .*\(max_batch\)"),
        ({"length_penalty": math.nan}, "length_penalty = nan; expected a number"),
        ({"length_penalty": math.inf}, "length_penalty = inf; expected a number"),
        ({"length_penalty": -40}, "length_penalty = -40; expected a number, 64 to the power of which"),
        ({"length_penalty": "1"}, "length_penalty = '1'; expected a number"),
        ({"max_new_tokens": 0}, "max_new_tokens of row 0 = 0"),
        ({"stop_ids": [97]}, "token of stop_ids of row 0 = 97"),
        ({"prompts": [[1], []]}, r"prompt of row 1 = \[\]: expected at least one"),
        ({"prompts": "a"}, "prompt of row 0 = 'a': expected token ids"),
    ],
)
def test_what_is_refused(keywords, message):
    with pytest.raises(UserError, match=message) as error:
        Sampler(make_model(), max_batch=8).beam_search(**{"prompts": [[1]]} | keywords)
    assert "\n" not in str(error.value)
