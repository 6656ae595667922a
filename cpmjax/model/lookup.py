"""Rows of a table for tokens, where the table is split.

B batch, L length, D width, V vocabulary; d and v, of these, on a device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cpmjax.parallel.sharding import divides, padded, padded_shape, partition, split_axes


def look_up(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """table [V, D], int32 tokens [B, L] -> [B, L, D] in the type of the table.

    Devices that have a part of the width each look up the tokens of all of them, and then give each the whole width of
    its own; of those that have a part of the vocabulary one knows a token, and the others add nothing. Neither the
    table nor its gradient is ever whole, which the compiler would make them.
    """
    columns, rows = split_axes("width"), split_axes("vocabulary")
    if not columns + rows or not divides(("rows", "length"), tokens_BL.shape):
        return table_VD[tokens_BL]

    def local(table_vd: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        for axis in columns:
            tokens_BL = jax.lax.all_gather(tokens_BL, axis, tiled=True)
        if rows:
            places = tokens_BL - jax.lax.axis_index(rows) * len(table_vd)
            here = (places >= 0) & (places < len(table_vd))
            x = jax.lax.psum(jnp.where(here[..., None], table_vd[jnp.where(here, places, 0)], 0), rows)
        else:
            x = table_vd[tokens_BL]
        for axis in reversed(columns):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True)
        return x

    axes = ("vocabulary" if rows else None, "width")
    on_devices = jax.shard_map(
        local,
        in_specs=(partition(axes), partition(("rows", "length"))),
        out_specs=partition(("rows", "length", None)),
    )
    whole_parts = padded_shape(jax.sharding.get_abstract_mesh(), axes, table_VD.shape)
    return on_devices(padded(table_VD, whole_parts), tokens_BL)
