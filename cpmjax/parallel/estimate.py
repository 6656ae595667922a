"""From what a program costs to how long a chip takes for it, by its data sheet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cpmjax.parallel.chips import Chip
from cpmjax.parallel.costs import Collective, Costs


@dataclass(frozen=True)
class Estimate:
    """Seconds of one run, each kind of work at its peak rate: what no run can be faster than."""

    products: float
    memory: float
    network: float  # all collectives one after the other

    @property
    def overlapped(self) -> float:
        """With all three at one time: the slowest of them (roofline)."""
        return max(self.products, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """With none of them at the same time."""
        return self.products + self.memory + self.network

    @property
    def limit(self) -> str:
        """What the slowest is."""
        return max(("products", "memory", "network"), key=lambda kind: getattr(self, kind))


def estimate(costs: Costs, chip: Chip, between_slices: Collection[str]) -> Estimate:
    """`between_slices` are the axes of the mesh whose collectives go over the network (`Topology.between_slices`)."""
    network = sum(seconds(each, chip, between_slices) for each in costs.collectives)
    return Estimate(costs.flops / chip.flops, costs.moved / chip.bandwidth, network)


def seconds(collective: Collective, chip: Chip, between_slices: Collection[str]) -> float:
    """One that goes along several axes, or along none that is known, has the slowest of the links there are."""
    crosses = any(axis in between_slices for axis in collective.axes) or (not collective.axes and between_slices)
    return collective.sent / (chip.network if crosses else chip.link)
