"""How many rows get other tokens in company than alone.

    python experiments/benchmarks/batch_invariance.py [--rows 10000] [--seed 0]

Rows of random prompts, options, seeds and limits, on the tiny model of tests/golden: each alone, and twice among
others, in another order and at another place, in batches of 256 and of 32, whose buckets are others too. XLA's matrix
products differ in the last bits with the batch size, so a row whose decision hangs on less than that may differ; its
options are printed. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import golden_models

from cpmjax import Sampler


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


def differing(
    model: Any, prompts: list[list[int]], options: dict[str, list[Any]], seed: int
) -> tuple[list[int], float]:
    """Rows whose tokens are not those of the row alone, and the largest relative difference of a log-probability
    among the rows whose tokens are."""
    rows = list(range(len(prompts)))

    def sample(order: list[int], together: int) -> dict[int, Any]:
        sampler = Sampler(model, max_batch=together)
        asked = {name: [values[row] for row in order] for name, values in options.items()}
        return dict(zip(order, sampler([prompts[row] for row in order], stop_ids=[2], **asked), strict=True))

    alone = sample(rows, 1)
    mixed = [sample(random.Random(seed + 1).sample(rows, len(rows)), together) for together in (256, 32)]
    other = sorted({row for found in mixed for row in rows if found[row].tokens != alone[row].tokens})
    furthest = 0.0
    for row in set(rows) - set(other):
        exact = np.asarray(alone[row].logprobs)
        for found in mixed:
            furthest = max(furthest, float(np.max(np.abs(found[row].logprobs - exact) / np.maximum(1, np.abs(exact)))))
    return other, furthest


def main(rows: int, seed: int) -> None:
    model = golden_models.load("minicpm-tiny-a")
    prompts, options = random_rows(rows, model.config.vocabulary, seed)
    other, furthest = differing(model, prompts, options, seed)
    for row in other:
        print(f"row {row}: { ({name: values[row] for name, values in options.items()}) }", file=sys.stderr)
    found = {"unit": "", "floor": None, "bar": None}
    print(json.dumps({"name": f"rows of {rows:,} with other tokens than alone", "sample": len(other), **found}))
    furthest_name = "largest difference of a log-probability, relative above 1"
    print(json.dumps({"name": furthest_name, "sample": furthest, **found, "bar": 1e-4}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
