"""The sampler: rows that do not know of each other, text and stops, what compiles, a mesh, and what is refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from cpmjax import Sampler, UserError
from cpmjax.data import tokenizer as tokenizers
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.initialise import initialise
from cpmjax.model.parameters import specs
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.mesh import make_mesh
from cpmjax.parallel.sharding import partition
from cpmjax.run.config import MeshConfig, ModelConfig
from cpmjax.sampling.decode import decode, prefill, take
from cpmjax.sampling.request import check

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))

import batch_invariance

VOCABULARY = 300
CONFIG = ModelConfig(
    vocabulary=VOCABULARY, width=16, layers=2, heads=4, kv_heads=2, feed_forward=32, dim_model_base=8, context=128
)


def make_model():
    return MiniCPM(CONFIG, jax.jit(initialise, static_argnums=0)(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def world():
    draw = random.Random(0)
    words = [" ".join("".join(draw.choices("abcdefgh", k=draw.randint(1, 5))) for _ in range(9)) for _ in range(60)]
    return make_model(), Tokenizer(tokenizers.train([*words, "é " * 9], VOCABULARY, 10**6))


@pytest.fixture(scope="module")
def sampler(world):
    return Sampler(*world)


def test_text_and_ids_are_the_same_prompt(world, sampler):
    _, tokenizer = world
    ids = [tokenizer.bos, *tokenizer.encode("abc de")]
    text, given = sampler(["abc de", ids], max_new_tokens=16, seed=7, stop_ids=())
    assert text == given and text.prompt == ids
    assert len(text.tokens) == len(text.logprobs) == 16 and text.finish_reason == "length"
    assert text.text == tokenizer.decode([*ids, *text.tokens])[len(tokenizer.decode(ids)) :]
    assert text.top_logprobs is None and text.prompt_logprobs is None


def test_log_probabilities_are_those_of_the_model(world, sampler):
    model, _ = world
    (sample,) = sampler([[1, 20, 30]], max_new_tokens=5, logprobs=3, prompt_logprobs=True, top_k=1, stop_ids=())
    logits = model(np.asarray([[*sample.prompt, *sample.tokens]], np.int32))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(sample.prompt_logprobs, expected[[0, 1], [20, 30]], atol=1e-5)
    np.testing.assert_allclose(sample.logprobs, expected[range(2, 7), sample.tokens], atol=1e-5)
    for place, found in enumerate(sample.top_logprobs):
        assert list(found) == np.argsort(-expected[2 + place])[:3].tolist()
        assert max(found.values()) == next(iter(found.values())) == pytest.approx(sample.logprobs[place], abs=1e-6)


def test_samples_of_a_prompt_are_rows_with_the_next_seeds(sampler):
    prompts = [[1, 5, 6], [1, 9]]
    together = sampler(prompts, n=3, seed=[10, 20], max_new_tokens=8, prompt_logprobs=True)
    assert [sample.prompt for sample in together] == [prompts[0]] * 3 + [prompts[1]] * 3
    for number, sample in enumerate(together):
        (alone,) = sampler([sample.prompt], seed=10 + 10 * (number // 3) + number % 3, max_new_tokens=8)
        assert sample.tokens == alone.tokens
        assert len(sample.prompt_logprobs) == len(sample.prompt) - 1
    assert len({tuple(sample.tokens) for sample in together}) == 6


@pytest.mark.slow
def test_a_row_does_not_know_of_the_others(world):
    """200 rows of any prompts, options and seeds: alone, and in other orders among 255 others and among 31."""
    found = batch_invariance.compare(world[0], *batch_invariance.random_rows(200, VOCABULARY, 1), 1)
    assert found.differing == [] and found.furthest < 1e-4


def test_no_more_compiles_after_the_first_of_each_shape(sampler):
    def count():
        return [function._cache_size() for function in (prefill, decode, take)]

    def use(seed, short, long):
        sampler([[1] * short], max_new_tokens=20, temperature=0.5, seed=seed, stop_ids=())
        sampler([[1] * long, [3] * short], max_new_tokens=[3, 20], top_p=0.9, seed=[seed, 4], stop_ids=[[2], [7]])
        sampler([[5] * short], n=2, max_new_tokens=20, top_k=seed, logit_bias={3: 1.0})
        list(sampler.stream([1] * short, max_new_tokens=20, seed=seed))

    before = count()
    use(1, 3, 20)
    warm = count()
    # Prompts of 16 and of 32 with one row and two, spread once; loops of one row, of two at 32, and of two at 16.
    assert np.all(np.subtract(warm, before) <= [2, 3, 1])
    use(2, 16, 32)
    Sampler(make_model(), sampler.tokenizer)([[1, 2]], max_new_tokens=30)
    assert count() == warm


def test_stop_strings_cut_the_text_and_the_tokens(sampler):
    (free,) = sampler(["abc"], max_new_tokens=40, seed=3, stop_ids=())
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 2]
    cut, other = sampler(["abc", "d"], max_new_tokens=40, seed=[3, 5], stop=[stop], stop_ids=())
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) < 40
    assert stop not in other.text
    assert "".join(sampler.stream("abc", max_new_tokens=40, seed=3, stop=[stop], stop_ids=())) == cut.text


def test_a_stop_id_ends_a_row_and_is_no_text(world, sampler):
    _, tokenizer = world
    (free,) = sampler(["abc"], max_new_tokens=20, seed=3, stop_ids=())
    (ended,) = sampler(["abc"], max_new_tokens=20, seed=3, stop_ids=[free.tokens[6]])
    place = free.tokens.index(free.tokens[6])
    assert ended.tokens == free.tokens[: place + 1] and ended.finish_reason == "stop"
    whole = tokenizer.decode([*ended.prompt, *ended.tokens[:-1]])
    assert ended.text == whole[len(tokenizer.decode(ended.prompt)) :]


def test_a_stream_is_the_text_and_can_be_closed(sampler):
    pieces = list(sampler.stream("abc", max_new_tokens=40, seed=11, stop_ids=()))
    (sample,) = sampler(["abc"], max_new_tokens=40, seed=11, stop_ids=())
    assert len(pieces) > 2 and "".join(pieces) == sample.text
    stream = sampler.stream("abc", max_new_tokens=40, seed=11, stop_ids=())
    assert next(stream) == pieces[0]
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize(
    "prompts, keywords, message",
    [
        ("", {}, "prompt of row 0 = '': expected at least one"),
        (["a", []], {}, r"prompt of row 1 = \[\]: expected at least one"),
        (["a", [1] * 128], {}, "row 1 .* fewer tokens than the 128 of the context, not 128"),
        ([[1], [2] * 100], {"max_new_tokens": [20, 29]}, "max_new_tokens of row 1 = 29: expected 1 to 28"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens of row 0 = 0: expected 1 to"),
        ("a", {"max_new_tokens": [1, 2]}, "max_new_tokens: 2 values; expected one"),
        ([[1, 300]], {}, "token of prompt of row 0 = 300: expected an id from 0 to 299"),
        (["a", "\ud800"], {}, r"prompt of row 1 = '\\ud800': expected text, all of it Unicode"),
        ([[1], 7], {}, "prompt of row 1 = 7: expected text or a list"),
        (7, {}, "prompts = 7; expected"),
        ("a", {"temprature": 1}, "temprature.*temperature"),
        ("a", {"temperature": float("nan")}, "temperature = nan"),
        ("a", {"top_p": 0}, "top_p = 0"),
        ("a", {"stop_ids": [-1]}, "token of stop_ids of row 0 = -1"),
        ("a", {"stop_ids": [[1], [2]]}, "stop_ids: 2 lists; expected one"),
        ("a", {"stop": [""]}, "stop = "),
        ("a", {"n": 0}, "n = 0"),
        ("a", {"logprobs": 301}, "logprobs = 301; expected 0 to 300"),
    ],
)
def test_what_is_refused(sampler, prompts, keywords, message):
    with pytest.raises(UserError, match=message) as error:
        sampler(prompts, **keywords)
    assert "\n" not in str(error.value)


def test_without_a_tokenizer_there_are_ids_alone(world):
    sampler = Sampler(world[0])
    (sample,) = sampler([[1, 2, 3]], max_new_tokens=8)
    assert len(sample.tokens) == 8 and sample.text == ""
    for refused in (lambda: sampler("a"), lambda: sampler([[1]], stop=["a"]), lambda: sampler.stream([1])):
        with pytest.raises(UserError, match="no tokenizer"):
            refused()
    assert sampler([]) == []


@pytest.mark.parametrize("length", [200, 4000])
def test_the_rows_that_fit_take_their_share_of_the_memory(length, monkeypatch):
    """As the compiler counts what their prefill takes: no more than a quarter, and no small part of it."""
    config = replace(CONFIG, width=256, heads=8, kv_heads=4, feed_forward=512, context=8192)
    sampler = Sampler(MiniCPM(config, jax.jit(initialise, static_argnums=0)(config, jax.random.key(0))))
    memory = {200: 2**28, 4000: 2**32}[length]
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}.__getitem__)
    rows = sampler._rows_that_fit(check(config, None, [[1] * length], 16, None, {}))
    tokens, lengths = np.zeros((rows, 1 << (length - 1).bit_length()), np.int32), np.ones(rows, np.int32)
    lowered = prefill.lower(config, sampler._weights, tokens, lengths, new_tokens=16, cache_dtype="float32")
    sizes = lowered.compile().memory_analysis()
    assert memory / 16 < sizes.temp_size_in_bytes + sizes.output_size_in_bytes < memory / 4


def check_a_mesh() -> None:
    """Runs in a process with four simulated devices."""
    model = make_model()
    asked = {"max_new_tokens": 12, "temperature": [0, 1, 1], "seed": 3, "top_p": 0.9, "n": 2, "stop_ids": ()}
    prompts = [[1, 5, 6], [1, 9], [4] * 20]
    expected = Sampler(model)(prompts, **asked)
    expected_beams = Sampler(model).beam_search(prompts, beams=3, max_new_tokens=12, stop_ids=[7])
    for axes in (MeshConfig(data=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=2), MeshConfig(data=4)):
        mesh = make_mesh(axes)
        placed = jax.tree.map(
            lambda spec, leaf, mesh=mesh: jax.device_put(leaf, NamedSharding(mesh, partition(spec.axes))),
            specs(CONFIG),
            model.parameters,
        )
        for cache_dtype in ("float32", "int8"):
            with jax.set_mesh(mesh):
                sampler = Sampler(MiniCPM(CONFIG, placed), cache_dtype=cache_dtype)
                found = sampler(prompts, **asked)
                found_beams = sampler.beam_search(prompts, beams=3, max_new_tokens=12, stop_ids=[7])
            if cache_dtype == "float32":
                assert [sample.tokens for sample in found] == [sample.tokens for sample in expected], axes
                for beams, others in zip(found_beams, expected_beams, strict=True):
                    assert [sample.tokens for sample in beams] == [sample.tokens for sample in others], axes
    check_an_odd_vocabulary(asked, prompts)


def check_an_odd_vocabulary(asked, prompts) -> None:
    """Padded on the mesh with tokens that nothing can choose: their logits of 0 would beat many others'."""
    config = replace(CONFIG, vocabulary=VOCABULARY + 1, tied=False)
    model = MiniCPM(config, initialise(config, jax.random.key(0)))
    expected = Sampler(model)(prompts, **asked, logprobs=3)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2))):
        found = Sampler(model)(prompts, **asked, logprobs=3)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens and [*map(list, one.top_logprobs)] == [*map(list, other.top_logprobs)]
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_mesh_gives_the_same_tokens():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-c", "import test_sampler; test_sampler.check_a_mesh()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
