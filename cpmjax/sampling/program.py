"""The programs of sampling, from shapes alone: what a plan reads.

B batch, P prompt length, T new tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cpmjax.model.parameters import Tree
from cpmjax.model.transformer import MiniCPM
from cpmjax.parallel.sharding import named_sharding
from cpmjax.run.config import Config
from cpmjax.sampling.decode import Request, decode, prefill
from cpmjax.sampling.options import make_options
from cpmjax.sampling.weights import arranged


class Sampling(NamedTuple):
    prefill: jax.stages.Compiled  # reads the prompts
    decode: jax.stages.Compiled  # its loop turns once for each new token
    weights: Any  # abstract, placed


def compile_sampling(config: Config, parameters: Tree, mesh: Mesh, rows: int, prompt: int, new: int) -> Sampling:
    """For prompts [B, P] with T new tokens each, on the mesh that is set; `parameters` are abstract, placed on it.

    In the compute type of the configuration. Raises UserError where the mesh does not divide the rows.
    """
    by_row = named_sharding(mesh, ("rows",), (rows,), "the rows of sampling")
    model = MiniCPM(config.model, parameters, config.compute)
    weights = _result(arranged.lower(model, jnp.dtype(config.compute.dtype), narrow=False))
    tokens_BP = jax.ShapeDtypeStruct((rows, prompt), np.int32, sharding=by_row)
    length_B = jax.ShapeDtypeStruct((rows,), np.int32, sharding=by_row)
    begin = prefill.lower(
        config.model, weights, tokens_BP, length_B, new_tokens=new, cache_dtype=config.compute.dtype
    ).compile()
    state, _ = _placed(begin)
    options = jax.eval_shape(lambda: make_options(rows, config.model.vocabulary))
    stop_ids_BJ: Any = jax.ShapeDtypeStruct((rows, 1), np.int32)
    limit_B: Any = length_B
    request = Request(options, stop_ids_BJ, limit_B)
    return Sampling(begin, decode.lower(config.model, weights, state, request, np.int32(new)).compile(), weights)


def _result(lowered: jax.stages.Lowered) -> Any:
    return _placed(lowered.compile())


def _placed(compiled: jax.stages.Compiled) -> Any:
    """What a program returns, abstract, where it leaves it."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        compiled.out_info,
        compiled.output_shardings,
    )
