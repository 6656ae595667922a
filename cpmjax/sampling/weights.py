"""Training leaves -> decode leaves: one dict a layer, projections of the same input fused, cast to the compute type.

Separate arrays, because a slice of a stacked one is copied before it is multiplied; fused, because at one row a token a
matrix product is nothing but reading its weights, and one long read is faster than several short ones.

D width, H heads, G key-value heads, R heads per key-value head, K head width, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cpmjax.model import mup
from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import constrain

Layer = dict[str, jax.Array]


class DecodeWeights(NamedTuple):
    """A pytree whose arrays have the compute type."""

    embedding: jax.Array  # [V, D]
    layers: tuple[Layer, ...]
    final_norm: jax.Array  # [D]
    head: jax.Array  # [D, V], or the embedding itself, [V, D], if the two are tied
    multipliers: mup.Multipliers


@jax.jit
def decode_weights(model: MiniCPM) -> DecodeWeights:
    """The weights of a model as `cpmjax.sampling.decode` wants them, placed on the mesh that is set, if one is.

    A layer has `query_key_value` [D, G * (R + 2) * K]: for each key-value head its R queries, its key and its value,
    so that a mesh that splits heads splits the matrix between them; `gate_up` [D, 2, F]; and `output`, `down` and the
    norms as they were. A tied head stays [V, D]: it needs no copy, and its transpose multiplies as fast.
    """
    config, parameters, dtype = model.config, model.parameters, jnp.dtype(model.compute.dtype)

    def layer(index: int) -> Layer:
        leaves: Tree = {name: leaf[index].astype(dtype) for name, leaf in parameters["layers"].items()}

        def by_group(name: str) -> jax.Array:
            return leaves[name].reshape(config.width, config.kv, -1)

        grouped = jnp.concatenate([by_group("query"), by_group("key"), by_group("value")], axis=-1)
        return {
            "attention_norm": constrain(leaves["attention_norm"], (None,)),
            "query_key_value": constrain(grouped.reshape(config.width, -1), ("width", "heads")),
            "output": constrain(leaves["output"], ("heads", "width")),
            "feed_forward_norm": constrain(leaves["feed_forward_norm"], (None,)),
            "gate_up": constrain(jnp.stack([leaves["gate"], leaves["up"]], 1), ("width", None, "feed_forward")),
            "down": constrain(leaves["down"], ("feed_forward", "width")),
        }

    embedding = constrain(parameters["embedding"].astype(dtype), ("vocabulary", "width"))
    head = embedding if config.tied else constrain(parameters["head"].astype(dtype), ("width", "vocabulary"))
    final_norm = constrain(parameters["final_norm"].astype(dtype), (None,))
    return DecodeWeights(embedding, tuple(map(layer, range(config.layers))), final_norm, head, model.multipliers)
