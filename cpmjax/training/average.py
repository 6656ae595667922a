"""The exponential moving average of a run's parameters (`training.ema`), evaluated and saved beside them.

In float32, it leaves the share `ema` of itself at every update, and is the mean of all parameters since it began,
weighted by ema ** age: nothing is left of where it began, as nothing is in Adam's moments after the correction of their
bias, which is taken into the share here. At update t it moves by (1 - ema) / (1 - ema ** t) of the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cpmjax.model.parameters import Tree


@jax.tree_util.register_dataclass
@dataclass
class Average:
    parameters: Tree  # float32
    updates: jax.Array | np.integer  # int32: how many are in it


def new_average(parameters: Tree) -> Average:
    """Of nothing yet; until the first update it shows the parameters, in arrays of its own."""
    return Average(jax.tree.map(jnp.copy, parameters), jnp.zeros((), jnp.int32))


def moved(average: Average, parameters: Tree, ema: float) -> Average:
    """After one more update, which led to `parameters`."""
    updates = average.updates + 1
    # As expm1, because 1 - ema ** t of a share near 1 has lost its digits in float32.
    share = math.expm1(math.log(ema)) / jnp.expm1(updates * math.log(ema))
    return Average(jax.tree.map(lambda a, p: a + share * (p - a), average.parameters, parameters), updates)
