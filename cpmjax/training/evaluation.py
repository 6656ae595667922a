"""Loss on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from cpmjax.data.batches import Rows, held_out_batches
from cpmjax.data.tokenizer import Tokenizer
from cpmjax.model.mup import Multipliers
from cpmjax.model.parameters import Tree
from cpmjax.parallel import distributed
from cpmjax.run.config import Config
from cpmjax.training.step import make_evaluation


class HeldOut:
    """Loss on the first `evaluation.rows` held-out rows of each corpus, the same at every call."""

    def __init__(self, config: Config, rows: Mapping[str, Rows], tokenizer: Tokenizer, sharding: NamedSharding):
        self._weights = {name: weight for name, weight in config.data.stable.items() if name in rows}
        self._evaluate = jax.jit(make_evaluation(config.model, config.compute))
        self._byte_lengths = jnp.asarray(tokenizer.byte_lengths(), jnp.float32)
        size, limit = config.training.batch_size // config.training.accumulation, config.evaluation.rows
        place = partial(jax.tree.map, partial(distributed.place, sharding=sharding))
        self._batches = {
            name: [place(batch) for batch in held_out_batches(corpus, limit, size)] for name, corpus in rows.items()
        }

    def __call__(self, parameters: Tree, multipliers: Multipliers | None = None) -> dict[str, float]:
        """`heldout/CORPUS` in nats per token and `bits_per_byte/CORPUS` for each corpus; `heldout_loss` and
        `heldout_bits_per_byte` are their means by the weights of the stable mixture, in every stage.

        `multipliers` replace those of the model's own parametrisation.
        """
        record: dict[str, float] = {}
        for name, batches in self._batches.items():
            sums = [self._evaluate(parameters, batch, self._byte_lengths, multipliers) for batch in batches]
            nats, tokens, size = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
            record[f"heldout/{name}"] = float(nats / tokens)
            record[f"bits_per_byte/{name}"] = float(nats / np.log(2) / size)
        if not self._weights:
            return record
        total = sum(self._weights.values())
        for mean, each in (("heldout_loss", "heldout"), ("heldout_bits_per_byte", "bits_per_byte")):
            record[mean] = sum(w / total * record[f"{each}/{name}"] for name, w in self._weights.items())
        return record
