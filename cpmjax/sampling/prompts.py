"""What a run is asked to write at intervals."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.run.config import Config
from cpmjax.sampling.request import check
from cpmjax.sampling.sampler import Sampler


class Prompts:
    """The prompts of `evaluation.prompts`, continued whenever the model has changed, on the mesh of `sharding`.

    Raises UserError, before the run begins, for a prompt that leaves no room for its continuation.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, sharding: NamedSharding):
        self._config = config
        self._tokenizer = tokenizer
        assert isinstance(sharding.mesh, Mesh)
        self._mesh = sharding.mesh
        self._prompts = list(config.evaluation.prompts)
        check(config.model, tokenizer, self._prompts, config.evaluation.sample_tokens, None, {})

    def __call__(self, parameters: Tree, step: int) -> list[dict[str, Any]]:
        """[{"step", "prompt", "text"}], the same for the same parameters, seed and step."""
        if not self._prompts:
            return []
        seeds = np.random.SeedSequence([self._config.run.seed, step]).generate_state(len(self._prompts))
        with jax.set_mesh(self._mesh):
            sampler = Sampler(MiniCPM(self._config.model, parameters, self._config.compute), self._tokenizer)
            samples = sampler(
                self._prompts,
                max_new_tokens=self._config.evaluation.sample_tokens,
                temperature=self._config.evaluation.temperature,
                seed=seeds,
            )
        texts = [sample.text for sample in samples]
        return [{"step": step, "prompt": p, "text": text} for p, text in zip(self._prompts, texts, strict=True)]
