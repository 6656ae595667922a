"""What a run is asked to write at intervals."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import RULES
from cpmjax.run.config import Config
from cpmjax.sampling.decode import generate


class Prompts:
    """The prompts of `evaluation.prompts`, tokenised once, continued whenever the model has changed."""

    def __init__(self, config: Config, tokenizer: Tokenizer, sharding: NamedSharding):
        self._config = config
        self._tokenizer = tokenizer
        self._ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in config.evaluation.prompts]
        # The first prompt fills up the rows, so that every device of the mesh has as many.
        parts = math.prod(sharding.mesh.shape[axis] for axis in RULES["rows"])
        prompts = self._ids + self._ids[:1] * (-len(self._ids) % parts)
        self._lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        self._prompts = np.zeros((len(prompts), max(map(len, prompts), default=0)), np.int32)
        for row, prompt in zip(self._prompts, prompts, strict=True):
            row[: len(prompt)] = prompt

    def __call__(self, parameters: Tree, step: int) -> list[dict[str, Any]]:
        """[{"step", "prompt", "text"}], the same for the same parameters, seed and step."""
        prompts, evaluation = self._config.evaluation.prompts, self._config.evaluation
        if not prompts:
            return []
        tokens_BT = generate(
            MiniCPM(self._config.model, parameters, self._config.compute),
            jnp.asarray(self._prompts),
            self._lengths,
            jax.random.fold_in(jax.random.key(self._config.run.seed), step),
            jnp.float32(evaluation.temperature),
            jnp.int32(self._tokenizer.eos),
            new_tokens=evaluation.sample_tokens,
        )
        return [
            {"step": step, "prompt": prompt, "text": self._continuation(ids, row)}
            for prompt, ids, row in zip(prompts, self._ids, np.asarray(tokens_BT).tolist(), strict=False)
        ]

    def _continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """What the tokens add to the text; a tokenizer may treat the start of a text unlike its middle."""
        return self._tokenizer.decode([*prompt, *tokens])[len(self._tokenizer.decode(prompt)) :]
