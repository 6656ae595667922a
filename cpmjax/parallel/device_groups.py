"""Groups of device numbers, as a compiled program names them, and the axes of the mesh that they are groups along."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from cpmjax.run.errors import UserError


def replica_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Groups of device numbers, from any of the three forms that XLA writes; where none are named all are one group.

    {{0,2},{1,3}}                                      the groups themselves
    [2,2]<=[2,2]T(1,0)                                 rows, after numbering the sizes on the right and transposing
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}  devices so numbered in a mesh, grouped along the axes at the end
    """
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _rows(_iota(found[2]).reshape(_integers(found[1])))
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{((?:'\w+',?)+)\}",
        attributes,
    ):
        mesh = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        numbers = _iota(found[2]) if found[2] else np.arange(math.prod(mesh.values()))
        return _along(
            numbers.reshape(tuple(mesh.values())), [list(mesh).index(axis) for axis in re.findall(r"\w+", found[3])]
        )
    if found := re.search(r"replica_groups=\{([\d,{}]*)\}", attributes):
        groups = [_integers(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
        return groups or [tuple(range(devices))]
    raise UserError(
        f"costs of a program: expected replica_groups={{{{0,1}},...}}, [n,m]<=[k] or mesh[...], not {attributes[:120]}"
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _iota(text: str) -> np.ndarray:
    """[2,4]T(1,0) -> 0..7 in that shape, transposed."""
    sizes, _, order = text.partition("T")
    return np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes)).transpose(_integers(order) or None)


def _along(numbers: np.ndarray, places: list[int]) -> list[tuple[int, ...]]:
    """The groups of numbers that differ in their index along `places` alone."""
    last = np.moveaxis(numbers, places, range(-len(places), 0))
    return _rows(last.reshape(-1, math.prod(numbers.shape[place] for place in places)))


def _rows(numbers: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in numbers]


def axes_of(groups: Sequence[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ, if the groups are those of axes; else ()."""
    wanted = {frozenset(group) for group in groups}
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    longer = [axis for axis, size in mesh.items() if size > 1]
    for axes in (axes for count in range(1, len(longer) + 1) for axes in itertools.combinations(longer, count)):
        if set(map(frozenset, _along(numbers, [list(mesh).index(axis) for axis in axes]))) == wanted:
            return axes
    return ()


def axes_between(pairs: Sequence[tuple[int, ...]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes along which any source differs from its target."""
    if not pairs:
        return ()
    places = np.stack(np.unravel_index(np.asarray(pairs), tuple(mesh.values())), axis=-1)  # [pair, end, axis]
    differs = (places[:, 0] != places[:, 1]).any(axis=0)
    return tuple(axis for axis, yes in zip(mesh, differs, strict=True) if yes)
