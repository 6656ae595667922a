"""Names of logical axes -> mesh axes. The one table, and the two ways to apply it: to parameters and to activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpmjax.run.errors import UserError

# A logical axis is what a dimension means; None stands for a dimension that is never split.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),  # of a batch
    "length": ("sequence",),
    "width": ("fsdp",),  # of a parameter; activations keep their width whole
    "heads": ("tensor",),
    "feed_forward": ("tensor",),
    "vocabulary": ("tensor",),
    "layers": (),  # scanned, so never split
}

Axes = Sequence[str | None]


def partition(axes: Axes) -> PartitionSpec:
    """Logical axes -> PartitionSpec. Two logical axes on one mesh axis are refused."""
    placed = [RULES[axis] if axis else () for axis in axes]
    used = [mesh_axis for mesh_axes in placed for mesh_axis in mesh_axes]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} share a mesh axis: {used}")
    return PartitionSpec(*(mesh_axes or None for mesh_axes in placed))


def named_sharding(mesh: Mesh, axes: Axes, shape: Sequence[int], name: str) -> NamedSharding:
    """Where an array of this shape lives. Raises UserError if a mesh axis does not divide its dimension."""
    for size, axis in zip(shape, axes, strict=True):
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in RULES[axis]) if axis else 1
        if size % parts:
            where = " x ".join(RULES[axis or ""])
            raise UserError(f"{name}: axis {axis} of size {size} cannot be split over mesh {where} = {parts}")
    return NamedSharding(mesh, partition(axes))


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pins an activation to the table's placement inside jit; nothing happens outside `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def splits(axis: str) -> bool:
    """Whether the mesh of `jax.set_mesh` has more than one part for a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape.get(mesh_axis, 1) > 1 for mesh_axis in RULES[axis])
