"""How many rows get other tokens in company than alone.

    python experiments/benchmarks/batch_invariance.py [--rows 10000] [--seed 0]

Rows of random prompts, options, seeds and limits, on the tiny model of tests/golden: each alone, and twice among
others, in another order and at another place, in batches of 256 and of 32, whose buckets are others too. XLA's matrix
products differ in the last bits with the batch size, so a row whose decision hangs on less than that may differ. Of
each that does it is tried whether its decision is that close: whether noise of a 1e-5th in the logits of the forward
pass, where the two parted, brings forth both tokens. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from measured import sample, say

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import golden_models

from cpmjax import Sampler
from cpmjax.sampling.logits import adjust, choose
from cpmjax.sampling.options import make_options

_TRIALS = 256  # with noise of their own


def random_rows(rows: int, vocabulary: int, seed: int) -> tuple[list[list[int]], dict[str, list[Any]]]:
    """Prompts, and options by name."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 60))] for _ in range(rows)]
    choices: dict[str, list[Any]] = {
        "temperature": [0, 0.3, 1.0, 2.0],
        "top_k": [0, 0, 20],
        "top_p": [1.0, 0.8],
        "min_p": [0.0, 0.0, 0.02],
        "typical_p": [1.0, 1.0, 0.9],
        "repetition_penalty": [1.0, 1.2],
        "presence_penalty": [0.0, 0.5],
    }
    options = {name: [draw.choice(values) for _ in prompts] for name, values in choices.items()}
    options["seed"] = [draw.randrange(2**32) for _ in prompts]
    options["max_new_tokens"] = [draw.randint(1, 32) for _ in prompts]
    return prompts, options


class Comparison(NamedTuple):
    differing: list[int]  # rows whose tokens are not those of the row alone
    unexplained: list[int]  # those of them whose decision is not so close that the last bits of the logits matter
    furthest: float  # largest relative difference of a log-probability among the rows whose tokens are the same


def compare(model: Any, prompts: list[list[int]], options: dict[str, list[Any]], seed: int) -> Comparison:
    rows = list(range(len(prompts)))

    def sample(order: list[int], together: int) -> dict[int, Any]:
        sampler = Sampler(model, max_batch=together)
        asked = {name: [values[row] for row in order] for name, values in options.items()}
        return dict(zip(order, sampler([prompts[row] for row in order], stop_ids=[2], **asked), strict=True))

    alone = sample(rows, 1)
    mixed = [sample(random.Random(seed + 1).sample(rows, len(rows)), together) for together in (256, 32)]
    differing, unexplained, furthest = set(), set(), 0.0
    for row, found in itertools.product(rows, mixed):
        one, other = alone[row], found[row]
        if one.tokens == other.tokens:
            gap = np.abs(np.subtract(one.logprobs, other.logprobs)) / np.maximum(1, np.abs(one.logprobs))
            furthest = max(furthest, float(gap.max()))
        else:
            differing.add(row)
            asked = {name: values[row] for name, values in options.items() if name != "max_new_tokens"}
            if not both_possible(model, one.prompt, one.tokens, other.tokens, asked):
                unexplained.add(row)
    return Comparison(sorted(differing), sorted(unexplained), furthest)


def both_possible(model: Any, prompt: list[int], one: list[int], other: list[int], asked: dict[str, Any]) -> bool:
    """Whether noise of a 1e-5th in the logits makes the first token in which two samples differ either of them."""
    place = next(at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    ids, vocabulary = [*prompt, *one[:place]], model.config.vocabulary
    logits_V = np.asarray(model(np.asarray([ids], np.int32)))[0, -1]
    noise_BV = 1e-5 * np.random.default_rng(0).standard_normal((_TRIALS, vocabulary))
    logits_BV = jnp.asarray(logits_V * (1 + noise_BV), jnp.float32)
    prompt_V = np.bincount(prompt, minlength=vocabulary) > 0
    counts_V = np.bincount(np.asarray(one[:place], int), minlength=vocabulary)
    prompt_BV, counts_BV = (jnp.broadcast_to(jnp.asarray(x), logits_BV.shape) for x in (prompt_V, counts_V))
    chosen = make_options(_TRIALS, vocabulary, **asked)
    tokens_B = choose(adjust(logits_BV, chosen, prompt_BV, counts_BV), chosen, jnp.full(_TRIALS, len(ids)))
    return {one[place], other[place]} <= set(np.asarray(tokens_B).tolist())


def main(rows: int, seed: int) -> None:
    model = golden_models.load("minicpm-tiny-a")
    found = compare(model, *random_rows(rows, model.config.vocabulary, seed), seed)
    about = f"of {rows:,} rows"
    say(
        [
            sample(f"{about}, those with other tokens than alone", "", len(found.differing)),
            sample(
                f"{about}, those of them whose decision is not within 1e-5 of the logits",
                "",
                len(found.unexplained),
                bar=0,
            ),
            sample("largest difference of a log-probability, relative above 1", "", found.furthest, bar=1e-4),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
