"""FLOPs of kernels that a compiled program calls and does not show: those of jax's splash attention, by their names."""

from __future__ import annotations

import math

from cpmjax.parallel.hlo import Computation, Instruction, shapes

# Matrix products in a pair of blocks: scores and what they mix; scores, the weights' gradients and the queries';
# scores, the values' gradients, the weights' and the keys'.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


def kernel_flops(call: Instruction, within: Computation) -> int | None:
    """2 for each multiplication in the blocks that causal attention goes through; None for a kernel not known here.

    The first operand of a splash kernel is about blocks, [..., queries' blocks, keys' blocks]; then, among others, come
    queries [..., heads, length, width].
    """
    products = next((count for name, count in _PRODUCTS.items() if call.name.startswith(name)), None)
    if products is None:
        return None
    operands = [shapes(within.instructions[name].result)[0][1] for name in call.arguments]
    blocks, queries = operands[0][-1], next(sizes for sizes in operands if len(sizes) >= 3 and sizes != operands[0])
    share = (blocks + 1) / (2 * blocks)
    return round(2 * products * math.prod(queries) * queries[-2] * share)
