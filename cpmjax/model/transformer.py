"""MiniCPM: embed, trunk of blocks, head. Llama with three muP scalars (paper section 3; OpenBMB modeling_minicpm.py):

    x      = embedding[tokens] * scale_emb
    x      = x + attention(norm(x)) * scale_depth / sqrt(layers)      for each layer, then the same with feed-forward
    logits = (norm(x) * dim_model_base / width) @ head

B batch, L length, D width, H heads, G key-value heads, K head width, F feed-forward, V vocabulary, N layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from cpmjax.model import mup, rotary
from cpmjax.model.dispatch import attention
from cpmjax.model.kernels import kept
from cpmjax.model.linear import linear
from cpmjax.model.lookup import look_up
from cpmjax.model.parameters import Tree
from cpmjax.parallel.sharding import constrain
from cpmjax.run.config import Attention, ComputeConfig, ModelConfig

ACTIVATION = ("rows", "length", None)

# Intermediate values a caller may ask for by name. Those of a layer come stacked, [N, ...]; a branch is tapped before
# it is scaled and added to the residual stream; query and key after rotation.
LAYER_TAPS = ("query", "key", "value", "attention", "feed_forward", "residual")
TAPS = ("embedding", *LAYER_TAPS, "final", "logits")


def rms_norm(gain_D: jax.Array, x_BLD: jax.Array, epsilon: float) -> jax.Array:
    """Variance in float32; normalised, cast back, and only then multiplied by the gain."""
    x32 = x_BLD.astype(jnp.float32)
    normalised = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return normalised.astype(x_BLD.dtype) * gain_D.astype(x_BLD.dtype)


class Surroundings(NamedTuple):
    """What a block needs to know beside x: the same for every layer."""

    residual: mup.Number  # multiplies each branch
    rotary: tuple[jax.Array, jax.Array]
    segments: jax.Array  # int32 [B, L]: the document of each token, 0 for padding
    attention: Attention


def block(config: ModelConfig, leaves: Tree, x_BLD: jax.Array, around: Surroundings) -> tuple[jax.Array, Tree]:
    """One layer -> (x, its tappable values)."""
    batch, length, _ = x_BLD.shape
    scale = jnp.asarray(around.residual, x_BLD.dtype)

    h_BLD = rms_norm(leaves["attention_norm"], x_BLD, config.norm_epsilon)
    query_BLHK = linear(leaves["query"], h_BLD).reshape(batch, length, config.heads, config.head)
    key_BLGK = linear(leaves["key"], h_BLD).reshape(batch, length, config.kv, config.head)
    value_BLGK = linear(leaves["value"], h_BLD).reshape(batch, length, config.kv, config.head)
    query_BLHK, key_BLGK = rotary.rotate(query_BLHK, around.rotary), rotary.rotate(key_BLGK, around.rotary)
    mixed_BLHK = attention(around.attention, query_BLHK, key_BLGK, value_BLGK, around.segments)
    attention_BLD = linear(leaves["output"], mixed_BLHK.reshape(batch, length, -1))
    x_BLD = constrain(x_BLD + attention_BLD * scale, ACTIVATION)

    h_BLD = rms_norm(leaves["feed_forward_norm"], x_BLD, config.norm_epsilon)
    gated_BLF = jax.nn.silu(linear(leaves["gate"], h_BLD)) * linear(leaves["up"], h_BLD)
    feed_forward_BLD = linear(leaves["down"], gated_BLF)
    x_BLD = constrain(x_BLD + feed_forward_BLD * scale, ACTIVATION)

    values = (query_BLHK, key_BLGK, value_BLGK, attention_BLD, feed_forward_BLD, x_BLD)
    return x_BLD, dict(zip(LAYER_TAPS, values, strict=True))


_POLICIES = jax.checkpoint_policies
# Of layers that are scanned: unrolled all, nothing keeps XLA from taking what was to be computed again from before.
_REMAT: dict[str, Any] = {
    "none": lambda f: f,
    "block": partial(jax.checkpoint, prevent_cse=False),
    "dots": partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=_POLICIES.save_from_both_policies(_POLICIES.dots_with_no_batch_dims_saveable, kept),
    ),
}


class MiniCPM(nnx.Module):
    """A model: a configuration and a plain nested dict of parameters. A pytree, so it passes through jax.jit.

    `model(tokens)` is the whole of it; `embed`, `trunk` and `head` are its parts.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Tree,
        compute: ComputeConfig = ComputeConfig(),
        multipliers: mup.Multipliers | None = None,
    ):
        """`multipliers` replace those of the configuration's own parametrisation; they may be arrays."""
        self.config = config
        self.compute = compute
        self.multipliers = nnx.data(multipliers or mup.multipliers(config))
        self.parameters = nnx.data(parameters)

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        taps: tuple[str, ...] = (),
    ) -> Any:
        """int32 tokens [B, L] -> float32 logits [B, L, V]; with `taps` (names from `TAPS`) -> (logits, {name: value}).

        Positions default to 0..L-1; segments (documents packed into a row, 0 for padding) to one document a row.
        Compiles once for each shape of tokens and set of taps.
        """
        unknown = set(taps) - set(TAPS)
        if unknown:
            raise ValueError(f"unknown taps {sorted(unknown)}: choose from {', '.join(TAPS)}")
        logits, tapped = _forward(self, jnp.asarray(tokens_BL), positions_BL, segments_BL, tuple(taps))
        return (logits, tapped) if taps else logits

    def embed(self, tokens_BL: jax.Array) -> jax.Array:
        """tokens -> [B, L, D] in the compute type, scaled by scale_emb."""
        # Looked up before the cast: the gradient of a token that comes often is summed in the type of the parameters.
        x_BLD = look_up(self.parameters["embedding"], tokens_BL).astype(self.compute.dtype)
        return constrain(x_BLD * jnp.asarray(self.multipliers.embedding, x_BLD.dtype), ACTIVATION)

    def trunk(
        self, x_BLD: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array, taps: tuple[str, ...] = ()
    ) -> tuple[jax.Array, Tree]:
        """All layers and the final norm -> ([B, L, D], tapped values stacked over layers).

        Dynamic rotary scaling follows each row's longest position.
        """
        config = self.config
        # The barrier: without it XLA's CPU compiler takes sines again for every query and key of every layer.
        angles = jax.lax.optimization_barrier(rotary.tables(config, positions_BL))
        around = Surroundings(self.multipliers.residual, angles, segments_BL, self.compute.attention)

        def layer(x_BLD: jax.Array, leaves: Tree) -> tuple[jax.Array, Tree]:
            x_BLD, values = block(config, leaves, x_BLD, around)
            return x_BLD, {name: value for name, value in values.items() if name in taps}

        x_BLD, tapped = jax.lax.scan(
            _REMAT[self.compute.remat](layer),
            x_BLD,
            self.parameters["layers"],
            unroll=min(self.compute.unroll, config.layers),
        )
        return rms_norm(self.parameters["final_norm"], x_BLD, config.norm_epsilon), tapped

    @property
    def head_weight(self) -> jax.Array:
        """[D, V]; of a tied model the embedding, transposed."""
        return self.parameters["embedding"].T if self.config.tied else self.parameters["head"]

    def head(self, h_BLD: jax.Array, weight_DV: jax.Array | None = None) -> jax.Array:
        """Hidden states of any leading shape -> float32 logits [..., V]; a weight takes the place of `head_weight`."""
        weight_DV = self.head_weight if weight_DV is None else weight_DV
        return linear(weight_DV, h_BLD * jnp.asarray(self.multipliers.logits, h_BLD.dtype)).astype(jnp.float32)


@partial(jax.jit, static_argnames="taps")
def _forward(
    model: MiniCPM,
    tokens_BL: jax.Array,
    positions_BL: jax.Array | None,
    segments_BL: jax.Array | None,
    taps: tuple[str, ...],
) -> tuple[jax.Array, Tree]:
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)
    if segments_BL is None:
        segments_BL = jnp.ones_like(tokens_BL)
    x_BLD = model.embed(tokens_BL)
    final_BLD, tapped = model.trunk(x_BLD, positions_BL, segments_BL, taps)
    logits_BLV = model.head(final_BLD)
    outer = {"embedding": x_BLD, "final": final_BLD, "logits": logits_BLV}
    return logits_BLV, tapped | {name: value for name, value in outer.items() if name in taps}
