"""Devices to named axes, and logical axes to mesh axes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cpmjax.model.parameters import flat, specs
from cpmjax.parallel.mesh import AXES, make_mesh
from cpmjax.parallel.sharding import RULES, named_sharding, partition
from cpmjax.run.config import MeshConfig, ModelConfig
from cpmjax.run.errors import UserError


@dataclass(frozen=True)
class Device:
    """All that the layout of a mesh asks of a device."""

    id: int
    platform: str = "cpu"
    device_kind: str = "TPU v5 lite"
    coords: tuple[int, int, int] = (0, 0, 0)  # in the torus of a slice
    core_on_chip: int = 0
    slice_index: int | None = None


def slices(count: int, side: int) -> list[Any]:
    """So many slices of TPUs, side x side each, in the order in which jax numbers them within a slice."""
    return [
        Device(side * y + x, "tpu", coords=(x, y, 0), slice_index=number)
        for number in range(count)
        for y in range(side)
        for x in range(side)
    ]


def devices(count: int) -> list[Any]:
    return [Device(number) for number in range(count)]


@pytest.mark.parametrize(
    "config, count, sizes",
    [
        (MeshConfig(), 1, (1, 1, 1, 1)),
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), 8, (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), 8, (1, 2, 2, 2)),
        (MeshConfig(fsdp=8), 8, (1, 8, 1, 1)),
    ],
)
def test_axes_multiply_to_the_devices_and_minus_one_takes_what_is_left(config, count, sizes):
    mesh = make_mesh(config, devices(count))
    assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence")
    assert tuple(mesh.shape[axis] for axis in AXES) == sizes
    assert [device.id for device in mesh.devices.flat] == list(range(count))
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=1, fsdp=3), "mesh: fsdp 3 does not fit 8 device"),
        (MeshConfig(data=-1, tensor=3), "tensor 3 does not fit 8 device"),
        (MeshConfig(data=2, fsdp=2), "data 2 x fsdp 2 does not fit 8 device"),
        (MeshConfig(data=4, fsdp=4), "data 4 x fsdp 4 does not fit 8 device"),
        (MeshConfig(data=1), "does not fit 8 device"),
    ],
)
def test_a_mesh_of_another_number_of_devices_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config, devices(8))


@pytest.mark.parametrize(
    "config, across",
    [
        (MeshConfig(), {"data"}),
        (MeshConfig(data=4, fsdp=-1), {"data"}),
        (MeshConfig(data=1, fsdp=-1, tensor=2), {"fsdp"}),
        (MeshConfig(data=2, fsdp=2, sequence=-1), {"data", "fsdp"}),
    ],
)
def test_slices_are_split_by_data_and_fsdp_alone(config, across):
    """Of four slices: along every other axis, and so in each step of tensor and sequence, the slice stays the same."""
    mesh = make_mesh(config, slices(4, 4))
    numbers = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert {axis for place, axis in enumerate(AXES) if np.ptp(numbers, axis=place).any()} == across
    assert len({(device.slice_index, device.id) for device in mesh.devices.flat}) == 4 * 16


def test_neighbours_on_an_axis_are_neighbours_in_the_torus():
    places = [device.coords for device in make_mesh(MeshConfig(data=1, fsdp=16), slices(1, 4)).devices.flat]
    apart = [sum(abs(a - b) for a, b in zip(one, other, strict=True)) for one, other in itertools.pairwise(places)]
    assert max(apart) == 1


def test_slices_that_only_tensor_or_sequence_could_split_are_refused():
    with pytest.raises(UserError, match="data 1 x fsdp 2 x tensor 32 x sequence 1 on 4 slices: expected data x fsdp"):
        make_mesh(MeshConfig(data=1, fsdp=2, tensor=32), slices(4, 4))


def test_partition_follows_the_table():
    assert partition(("rows", "length")) == PartitionSpec(("data", "fsdp"), ("sequence",))
    assert partition(("layers", "width", "heads")) == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert partition((None, "vocabulary")) == PartitionSpec(None, ("tensor",))


@pytest.mark.parametrize("axes", [("heads", "feed_forward"), ("rows", "width"), ("width", "width")])
def test_two_logical_axes_on_one_mesh_axis_are_refused(axes):
    with pytest.raises(ValueError, match="share a mesh axis"):
        partition(axes)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_a_place(tied):
    """Sizes that all axes divide: nothing is refused, and every axis a parameter names is in the table."""
    mesh = AbstractMesh((1, 2, 2, 1), AXES)
    for name, spec in flat(specs(ModelConfig(tied=tied))).items():
        assert set(spec.axes) <= RULES.keys()
        assert len(named_sharding(mesh, spec.axes, spec.shape, name).spec) == len(spec.shape)


def test_an_axis_that_does_not_divide_is_refused_with_the_numbers():
    mesh = AbstractMesh((2, 3, 1, 1), AXES)
    with pytest.raises(UserError, match="batch: axis rows of size 8 cannot be split over mesh data x fsdp = 6"):
        named_sharding(mesh, ("rows", "length"), (8, 32), "batch")
    assert named_sharding(mesh, (None, "length"), (8, 32), "batch").spec == PartitionSpec(None, ("sequence",))
