"""Rows of a table for tokens, where the table is split.

B batch, L length, D width, V vocabulary; d width on a device.
"""

from __future__ import annotations

import jax

from cpmjax.parallel.sharding import by_hand, only, partition, split_axes


def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """table [V, D], int32 tokens [B, L] -> [B, L, D] in the type of the table.

    Devices that have a part of the width each look up the tokens of all of them, and then give each the whole width of
    its own. Neither the table nor its gradient is ever whole, which the compiler would make them.
    """
    across = split_axes("width")
    if not across:
        return table_VD[tokens_BL]

    def local(table_Vd: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        for axis in across:
            tokens_BL = jax.lax.all_gather(tokens_BL, axis, tiled=True)
        x = table_Vd[tokens_BL]
        for axis in reversed(across):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True)
        return x

    axes = split_axes("rows", "length")
    table, rows = (only(axes, partition(names)) for names in (("vocabulary", "width"), ("rows", "length")))
    on_devices = jax.shard_map(local, in_specs=(table, rows), out_specs=rows, axis_names=by_hand(axes))
    return on_devices(table_VD, tokens_BL)
