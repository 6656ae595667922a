"""Devices -> a mesh with named axes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from cpmjax.run.config import MeshConfig
from cpmjax.run.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
_ACROSS = ("data", "fsdp")  # the axes that may go from one slice to another, over the network


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or the given ones) with the axes `AXES`, an axis of -1 taking what is left.

    Of several slices of TPUs, `data` and then `fsdp` go across; within one, neighbours on an axis are neighbours in
    the torus. Other devices are taken in order, which is host by host: the last axes stay within one.

    Axis types are Auto in every version of jax: the compiler propagates shardings from the parameters and the batch.
    Raises UserError if the axes do not multiply to the number of devices, or slices cannot be split by them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    if len(devices) % fixed or (not open_axes and fixed != len(devices)):
        wanted = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] != 1)
        raise UserError(f"mesh: {wanted} does not fit {len(devices)} device(s): the axes must multiply to that number")
    for axis in open_axes:
        sizes[axis] = len(devices) // fixed
    arranged = _arranged(tuple(sizes[axis] for axis in AXES), devices)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh."""
    if devices[0].platform != "tpu" or len(devices) == 1:
        return np.asarray(devices).reshape(shape)
    by_slice = itertools.groupby(sorted(devices, key=_slice), key=_slice)
    slices = [list(group) for _, group in by_slice]
    across, left = [1] * len(shape), len(slices)
    for place, axis in enumerate(AXES):
        if axis in _ACROSS:
            across[place] = math.gcd(shape[place], left)
            left //= across[place]
    if left > 1:
        sizes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise UserError(
            f"mesh: {sizes} on {len(slices)} slices: expected data x fsdp to be a multiple of them; "
            "tensor and sequence stay within a slice"
        )
    within = tuple(size // parts for size, parts in zip(shape, across, strict=True))
    parts = [mesh_utils.create_device_mesh(within, part, allow_split_physical_axes=True) for part in slices]
    # [across 0, ..., within 0, ...] -> [across 0 * within 0, ...]
    stacked = np.stack(parts).reshape(*across, *within)
    order = itertools.chain.from_iterable((axis, axis + len(shape)) for axis in range(len(shape)))
    return stacked.transpose(*order).reshape(shape)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", None) or 0
