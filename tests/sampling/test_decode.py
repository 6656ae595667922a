"""The decode loop against the greedy tokens of the original code."""

from __future__ import annotations

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpmjax.sampling.decode import generate

NO_END = jnp.int32(-7)


def batch(numbers):
    prompts = [numbers[f"greedy_prompt_{row}"] for row in range(3)]
    padded = np.zeros((3, max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return jnp.asarray(padded), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


@pytest.mark.parametrize("name", ["minicpm-tiny-a", "minicpm-tiny-gqa"])
def test_greedy_tokens_of_the_original(name):
    model, numbers = golden_models.load(name), golden_models.expected(name)
    tokens = generate(model, *batch(numbers), jax.random.key(0), jnp.float32(0), NO_END, new_tokens=32)
    for row in range(3):
        np.testing.assert_array_equal(tokens[row], numbers[f"greedy_tokens_{row}"])


def test_a_row_stops_at_its_end_and_the_others_go_on():
    model, numbers = golden_models.load("minicpm-tiny-a"), golden_models.expected("minicpm-tiny-a")
    end = int(numbers["greedy_tokens_0"][4])
    tokens = generate(model, *batch(numbers), jax.random.key(0), jnp.float32(0), jnp.int32(end), new_tokens=32)
    for row in range(3):
        free = numbers[f"greedy_tokens_{row}"]
        stop = int(np.argmax(free == end)) if end in free else 32
        np.testing.assert_array_equal(tokens[row, :stop], free[:stop])
        assert (np.asarray(tokens[row, stop:]) == end).all()


def test_sampling_follows_the_probabilities():
    """20,000 first tokens at temperature 2 against softmax(logits / 2): total variation within sampling noise."""
    model, numbers = golden_models.load("minicpm-tiny-a"), golden_models.expected("minicpm-tiny-a")
    prompt = numbers["greedy_prompt_2"][:6]
    logits = np.asarray(model(jnp.asarray(prompt[None], jnp.int32)))[0, -1].astype(np.float64) / 2
    expected = np.exp(logits - logits.max())
    expected /= expected.sum()
    rows = jnp.asarray(np.tile(prompt, (20_000, 1)), jnp.int32)
    lengths = jnp.full(20_000, len(prompt), jnp.int32)
    tokens = generate(model, rows, lengths, jax.random.key(1), jnp.float32(2), NO_END, new_tokens=1)
    observed = np.bincount(np.asarray(tokens)[:, 0], minlength=503) / 20_000
    noise = np.sqrt(expected / 20_000).sum() / 2
    assert np.abs(observed - expected).sum() / 2 < 1.5 * noise
