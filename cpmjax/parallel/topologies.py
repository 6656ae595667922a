"""Machines that are not here, by name: devices to compile for, and the chip that they are made of."""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from cpmjax.parallel.chips import CHIPS, Chip
from cpmjax.run import libtpu
from cpmjax.run.errors import UserError

_EXAMPLES = "v5e:4x4, v5p:2x2x2, h100:8, rtx4090:1, cpu:8"


class Topology(NamedTuple):
    name: str
    devices: Sequence[jax.Device]
    slices: int
    chip: Chip | None  # None of a simulated CPU
    simulated: bool  # compiled by this machine's compiler, so that memory and collectives are an estimate

    def slice_of(self, device: jax.Device) -> int:
        if self.simulated:
            return device.id * self.slices // len(self.devices)
        return getattr(device, "slice_index", None) or 0

    def between_slices(self, mesh: Mesh) -> set[str]:
        """The axes of a mesh of these devices on which neighbours may be in two slices."""
        numbers = np.vectorize(self.slice_of)(mesh.devices)
        return {axis for place, axis in enumerate(mesh.axis_names) if np.ptp(numbers, axis=place).any()}


def topology(name: str, slices: int = 1) -> Topology:
    """`v5e:4x4` is a slice of TPUs, through `libtpu`; `h100:8` a host of GPUs and `cpu:8` one of CPU devices,
    both simulated.

    `slices` of them are connected by a network. To be called before anything else starts jax's backends. Raises
    UserError for a name that is none, and where libtpu is needed and not installed.
    """
    if slices < 1:
        raise UserError(f"--slices = {slices}: expected 1 or more")
    form = re.fullmatch(r"([a-z0-9\-]+):([1-9]\d{0,4}(?:x[1-9]\d{0,4})*)", name)
    kind = form[1] if form else name.partition(":")[0]
    if kind not in (*CHIPS, "cpu"):
        near = difflib.get_close_matches(kind, CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--topology = {name!r}: expected one of {', '.join(CHIPS)} or cpu, as in {_EXAMPLES}{hint}")
    if form is None:
        raise UserError(f"--topology = {name!r}: expected sizes after a colon, as in {_EXAMPLES}")
    chip = CHIPS.get(kind)
    if chip is not None and chip.kinds[0].startswith("TPU"):
        return Topology(name, _tpus(name, slices), slices, chip, simulated=False)
    count = slices * math.prod(map(int, form[2].split("x")))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) != count:
        raise RuntimeError(f"{len(devices)} simulated devices, not {count}: jax's backends had been started before")
    return Topology(name, devices, slices, chip, simulated=True)


def _tpus(name: str, slices: int) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology = {name!r}: expected libtpu installed, which has the compiler (pip install 'cpmjax[tpu]')"
        )
    libtpu.keep_quiet()
    jax.config.update("jax_platforms", "cpu")
    try:
        # A runtime for several slices is told of them; one is the default.
        options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if set(re.findall(r"\d+", name.partition(":")[2])) == {"1"}:  # a single chip, which is less than a host has
            options["chips_per_host_bounds"] = (1, 1, 1)
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:  # jax has several for it
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology = {name!r}: libtpu knows no such slice ({reason}); expected one as in {_EXAMPLES}"
        ) from error
