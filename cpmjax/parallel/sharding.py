"""Names of logical axes -> mesh axes. The one table, and the two ways to apply it: to parameters and to activations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

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


def parts(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    """Into how many parts a mesh, which may be empty, splits a logical axis."""
    return math.prod(mesh.shape.get(mesh_axis, 1) for mesh_axis in RULES[axis]) if axis else 1


def padded_shape(mesh: Mesh | AbstractMesh, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in which an array is placed: the vocabulary, an odd 122,753 in MiniCPM, is a multiple of its parts."""
    return tuple(
        -(-size // parts(mesh, axis)) * parts(mesh, axis) if axis == "vocabulary" else size
        for size, axis in zip(shape, axes, strict=True)
    )


def padded(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """x with zeros after its own entries, up to a shape."""
    missing = [(0, size - own) for size, own in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, missing) if x.shape != tuple(shape) else x


def at_rest(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """Where an array lives whose vocabulary the mesh does not divide, in its true shape: the vocabulary stays whole,
    and what would split it splits the width instead, beside what does already, if it divides that, too."""
    width = RULES["width"] + RULES["vocabulary"]
    if "width" not in axes or shape[axes.index("width")] % math.prod(mesh.shape[axis] for axis in width):
        width = RULES["width"]
    return NamedSharding(mesh, PartitionSpec(*(width if axis == "width" else None for axis in axes)))


def named_sharding(mesh: Mesh, axes: Axes, shape: Sequence[int], name: str) -> NamedSharding:
    """Where an array of this shape lives. Raises UserError if a mesh axis does not divide its dimension."""
    for size, axis in zip(shape, axes, strict=True):
        if axis and size % parts(mesh, axis):
            where = f"{' x '.join(RULES[axis])} = {parts(mesh, axis)}"
            raise UserError(f"{name}: axis {axis} of size {size} cannot be split over mesh {where}")
    return NamedSharding(mesh, partition(axes))


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pins an activation to the table's placement inside jit; nothing happens outside `jax.set_mesh`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes))


def split_axes(*axes: str) -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh`, of more than one part, over which logical axes are split."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for axis in axes for name in RULES[axis] if mesh.shape.get(name, 1) > 1)


def splits(axis: str) -> bool:
    """Whether the mesh of `jax.set_mesh` has more than one part for a logical axis."""
    return bool(split_axes(axis))


def divides(axes: Axes, shape: Sequence[int]) -> bool:
    """Whether the mesh of `jax.set_mesh` divides an array of these logical axes: then `jax.shard_map` takes it."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size % parts(mesh, axis) == 0 for axis, size in zip(axes, shape, strict=True))
