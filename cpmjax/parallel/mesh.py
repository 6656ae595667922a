"""Devices -> a mesh with named axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from cpmjax.run.config import MeshConfig
from cpmjax.run.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or the given ones) with the axes `AXES`, an axis of -1 taking what is left.

    Axis types are Auto in every version of jax: the compiler propagates shardings from the parameters and the batch.
    Raises UserError if the axes do not multiply to the number of devices.
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
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
