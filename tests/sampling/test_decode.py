"""The decode loop against the original code, against the forward pass without a cache, and against itself in parts."""

from __future__ import annotations

from dataclasses import replace

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.model.attention import CHUNK
from cpmjax.model.initialise import initialise
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import ComputeConfig, ModelConfig
from cpmjax.sampling.decode import Request, decode, head, prefill, take
from cpmjax.sampling.options import make_options
from cpmjax.sampling.weights import decode_weights, widened

T = 32
SMALL = ModelConfig(vocabulary=97, width=32, layers=2, heads=4, kv_heads=2, feed_forward=80, dim_model_base=16)
MODELS = {
    "tied": SMALL,
    "untied": replace(SMALL, tied=False),
    "large": replace(SMALL, vocabulary=5000, width=128, feed_forward=5000, layers=6),  # `down` in two parts
    "dynamic": replace(SMALL, context=12, rope_scaling="dynamic", rope_factor=4.0),
}


def padded(prompts, width=None):
    width = width or max(16, 1 << (max(map(len, prompts)) - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def start(model, prompts, cache_dtype="float32", **keywords):
    return prefill(
        model.config, decode_weights(model), *padded(prompts), new_tokens=T, cache_dtype=cache_dtype, **keywords
    )


def request(model, rows, stop_ids=(), limit=T, **options):
    stops = np.full((rows, max(1, len(stop_ids))), -1, np.int32)
    stops[:, : len(stop_ids)] = stop_ids
    limits = jnp.broadcast_to(jnp.asarray(limit, jnp.int32), (rows,))
    return Request(make_options(rows, model.config.vocabulary, **options), jnp.asarray(stops), limits)


def run(model, state, asked, steps=T):
    return decode(model.config, decode_weights(model), state, asked, jnp.int32(steps))


def small(name="tied", stored="float32"):
    config = MODELS[name]
    parameters = initialise(config, jax.random.key(3))
    return MiniCPM(config, jax.tree.map(lambda leaf: leaf.astype(stored), parameters))


def prompts_of(model, lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, model.config.vocabulary, length).tolist() for length in lengths]


def log_softmax(logits):
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("name", ["minicpm-tiny-a", "minicpm-tiny-gqa"])
def test_greedy_tokens_of_the_original_alone_and_together(name):
    model, numbers = golden_models.load(name), golden_models.expected(name)
    prompts = [numbers[f"greedy_prompt_{row}"].tolist() for row in range(3)]
    for rows in ([0], [1], [2], [0, 1, 2]):
        state, _ = start(model, [prompts[row] for row in rows])
        state = run(model, state, request(model, len(rows), temperature=0))
        for place, row in enumerate(rows):
            np.testing.assert_array_equal(state.tokens_BT[place], numbers[f"greedy_tokens_{row}"])


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_cache_changes_nothing(name, stored):
    """Sampled rows again through the forward pass without a cache: the logits after the last token, and all scores."""
    model = small(name, stored)
    prompts = prompts_of(model, [5, 16, 11])
    state, scores = start(model, prompts, top=4, score=True)
    state = run(model, state, request(model, 3, seed=[1, 2, 3]))
    found = np.asarray(head(model.config, decode_weights(model), state.hidden_BD))
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, np.asarray(state.tokens_BT).tolist(), strict=True)]
    all_logits = np.asarray(model(padded(rows, 48)[0]))
    for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True)):
        logits = all_logits[row, : len(tokens)]
        assert np.abs(found[row] - logits[-1]).max() < 1e-5 * np.abs(logits[-1]).max()
        expected = log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
        length = len(prompt)
        np.testing.assert_allclose(scores[row, 1:length], expected[: length - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.log_probabilities_BT[row], expected[length - 1 :], rtol=1e-5, atol=1e-5)
        best = np.sort(log_softmax(logits[length - 1 : -1]), axis=-1)[:, :-5:-1]
        np.testing.assert_allclose(state.top_values_BTC[row], best, rtol=1e-5, atol=1e-5)


def test_a_prompt_of_several_chunks():
    model = small()
    prompts = prompts_of(model, [CHUNK + 200, CHUNK - 10])
    state, scores = start(model, prompts, score=True)
    assert scores.shape == (2, 2 * CHUNK)
    found = np.asarray(head(model.config, decode_weights(model), state.hidden_BD))
    for row, prompt in enumerate(prompts):
        logits = np.asarray(model(np.asarray([prompt], np.int32))[0])
        assert np.abs(found[row] - logits[-1]).max() < 1e-5 * np.abs(logits[-1]).max()
        expected = log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scores[row, 1 : len(prompt)], expected, rtol=1e-5, atol=1e-5)


def test_the_prefill_of_a_long_prompt_holds_nothing_quadratic_and_not_all_logits():
    config, length = replace(SMALL, vocabulary=30_000), 16384
    weights = jax.eval_shape(lambda: decode_weights(MiniCPM(config, initialise(config, jax.random.key(0)))))
    shapes = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = prefill.lower(config, weights, *shapes, new_tokens=T, cache_dtype="float32", score=True)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    # Scores of one chunk, twice, and a few vectors a token. All scores are 13 times as much, all logits 6 times.
    assert temporary < 2.5 * 4 * config.heads * CHUNK * length


def test_dynamic_scaling_follows_the_prompt_and_not_its_padding():
    model = small("dynamic")
    prompt = prompts_of(model, [14])[0]
    logits = np.asarray(model(np.asarray([prompt], np.int32))[0, -1])
    for width in (16, 64):
        state, _ = prefill(
            model.config, decode_weights(model), *padded([prompt], width), new_tokens=T, cache_dtype="float32"
        )
        found = np.asarray(head(model.config, decode_weights(model), state.hidden_BD))[0]
        assert np.abs(found - logits).max() < 1e-5 * np.abs(logits).max()


def test_by_eights_as_at_once():
    model = small()
    prompts, asked = prompts_of(model, [3, 9]), request(model, 2, limit=[21, 32], seed=4, top_p=0.9)
    at_once = run(model, start(model, prompts)[0], asked)
    state = start(model, prompts)[0]
    for _ in range(4):
        state = run(model, state, asked, steps=8)
    for name in ("tokens_BT", "log_probabilities_BT", "counts_BV", "length_B", "generated_B", "ended_B"):
        np.testing.assert_array_equal(getattr(state, name), getattr(at_once, name))


def test_rows_end_at_their_stop_ids_and_limits_and_the_others_go_on():
    model, numbers = golden_models.load("minicpm-tiny-a"), golden_models.expected("minicpm-tiny-a")
    prompts = [numbers[f"greedy_prompt_{row}"].tolist() for row in range(3)]
    end, limits = int(numbers["greedy_tokens_0"][4]), [32, 7, 0]
    asked = request(model, 3, stop_ids=(501, end), limit=limits, temperature=0)
    state = run(model, start(model, prompts)[0], asked)
    assert np.asarray(state.ended_B).all()
    for row, limit in enumerate(limits):
        free = numbers[f"greedy_tokens_{row}"][:limit]
        places = np.flatnonzero((free == end) | (free == 501))
        count = places[0] + 1 if len(places) else limit
        assert state.generated_B[row] == count
        assert state.length_B[row] == len(prompts[row]) + count
        np.testing.assert_array_equal(state.tokens_BT[row, :count], free[:count])
        assert not np.asarray(state.tokens_BT[row, count:]).any()
        np.testing.assert_array_equal(state.counts_BV[row], np.bincount(free[:count], minlength=503))


def test_rows_taken_twice_go_on_as_if_read_twice():
    model = small()
    prompts, asked = prompts_of(model, [7, 4]), request(model, 3, seed=[8, 9, 8])
    apart = run(model, start(model, [prompts[1], prompts[1], prompts[0]])[0], asked)
    shared = run(model, take(start(model, prompts)[0], jnp.asarray([1, 1, 0])), asked)
    np.testing.assert_array_equal(shared.tokens_BT, apart.tokens_BT)
    assert not np.array_equal(shared.tokens_BT[0], shared.tokens_BT[1])


def test_an_int8_cache_is_close():
    """KL of the next token after the same 32, a token that its bias forces."""
    model, numbers = golden_models.load("minicpm-tiny-gqa"), golden_models.expected("minicpm-tiny-gqa")
    prompts = [numbers[f"greedy_prompt_{row}"].tolist() for row in range(3)]
    forced = {int(numbers["greedy_tokens_0"][0]): 1e9}
    asked = request(model, 3, temperature=0, logit_bias=forced)
    exact, rounded = (run(model, start(model, prompts, dtype)[0], asked) for dtype in ("float32", "int8"))
    assert rounded.layers[0].key_BGSK.dtype == np.int8
    np.testing.assert_array_equal(exact.tokens_BT, rounded.tokens_BT)
    p, q = (log_softmax(head(model.config, decode_weights(model), state.hidden_BD)) for state in (exact, rounded))
    divergence = (np.exp(p) * (p - q)).sum(axis=-1)
    assert (divergence > 0).all() and divergence.max() < 1e-3


def test_the_state_is_moved_on_in_its_own_memory():
    model = small()
    state, _ = start(model, prompts_of(model, [9] * 4))
    asked, weights = request(model, 4), decode_weights(model)
    used = decode.lower(model.config, weights, state, asked, jnp.int32(8)).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert used.alias_size_in_bytes >= size
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers))
    assert used.temp_size_in_bytes < cache / 2


@pytest.mark.smoke
def test_weights_that_are_stored_narrow_are_never_widened_at_once():
    """Not the table of embeddings either: decode takes less memory beside its arguments than half a part of a matrix in
    float32 would, and a prefill less than the weights of two layers."""
    model = small("large", "bfloat16")
    weights, prompts = decode_weights(model), prompts_of(model, [9])
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) == pytest.approx(stored, rel=0.01)
    state, _ = start(model, prompts)
    used = decode.lower(model.config, weights, state, request(model, 1), jnp.int32(8)).compile().memory_analysis()
    part = weights.layers[0]["down"].parts_OI[1]
    assert used.temp_size_in_bytes < 4 * part.size / 2
    reading = prefill.lower(model.config, weights, *padded(prompts), new_tokens=T, cache_dtype="float32")
    layers = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters["layers"]))
    assert reading.compile().memory_analysis().temp_size_in_bytes < layers * 2 / model.config.layers


def test_narrow_and_widened_weights_are_the_same_model():
    model = small("untied", "bfloat16")
    prompts, asked = prompts_of(model, [7, 4, 12]), request(model, 3, seed=[8, 9, 8])
    narrow = decode_weights(model)
    wide = widened(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float32")}
    found = [decode(model.config, weights, start(model, prompts)[0], asked, jnp.int32(T)) for weights in (narrow, wide)]
    np.testing.assert_array_equal(found[0].tokens_BT, found[1].tokens_BT)
    np.testing.assert_allclose(found[0].log_probabilities_BT, found[1].log_probabilities_BT, rtol=1e-4)


def test_a_model_computed_in_bfloat16_decodes_with_the_weights_that_it_computes_with():
    """On a CPU its arithmetic is float32, so as of weights that were rounded before."""
    model, rounded = small(), small(stored="bfloat16")
    model = MiniCPM(model.config, model.parameters, ComputeConfig(dtype="bfloat16"))
    assert jax.tree.map(lambda leaf: leaf.dtype, decode_weights(model).layers) == jax.tree.map(
        lambda leaf: leaf.dtype, decode_weights(rounded).layers
    )
    prompts = prompts_of(model, [7, 4, 12])
    found = [run(each, start(each, prompts)[0], request(each, 3, seed=5)) for each in (model, rounded)]
    np.testing.assert_array_equal(found[0].tokens_BT, found[1].tokens_BT)


@pytest.mark.slow
def test_sampling_follows_the_probabilities():
    """6,000 first tokens at temperature 2 against softmax(logits / 2): total variation within sampling noise."""
    model, numbers = golden_models.load("minicpm-tiny-a"), golden_models.expected("minicpm-tiny-a")
    prompt = numbers["greedy_prompt_2"][:6].tolist()
    expected = np.exp(log_softmax(np.asarray(model(np.asarray([prompt], np.int32)))[0, -1] / 2))
    rows = 2000
    counts = np.zeros(503)
    for part in range(3):
        state = take(start(model, [prompt])[0], jnp.zeros(rows, jnp.int32))
        asked = request(model, rows, temperature=2, seed=list(range(part * rows, part * rows + rows)))
        counts += np.bincount(np.asarray(run(model, state, asked, steps=1).tokens_BT[:, 0]), minlength=503)
    noise = np.sqrt(expected / counts.sum()).sum() / 2
    assert np.abs(counts / counts.sum() - expected).sum() / 2 < 1.5 * noise
