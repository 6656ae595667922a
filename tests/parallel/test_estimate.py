"""Seconds from a data sheet, by hand."""

from __future__ import annotations

import pytest

from cpmjax.parallel.chips import Chip
from cpmjax.parallel.costs import Collective, Costs
from cpmjax.parallel.estimate import estimate

CHIP = Chip(("a chip",), flops=1e12, memory=1e9, bandwidth=1e11, link=1e10, network=1e9)


def collective(*axes: str, sent: float) -> Collective:
    return Collective("all-reduce", axes, 1, sent)


def test_the_slowest_of_three_is_the_least_that_a_step_takes():
    costs = Costs(3 * 10**12, 2e11, (collective("fsdp", sent=1e10), collective("data", sent=1e9)), ())
    within = estimate(costs, CHIP, set())
    assert (within.products, within.memory, within.network) == pytest.approx((3, 2, 1.1))
    assert (within.overlapped, within.in_turn, within.limit) == (3, pytest.approx(6.1), "products")
    # Between slices the network is ten times as slow.
    between = estimate(costs, CHIP, {"fsdp"})
    assert (between.network, between.overlapped, between.limit) == (pytest.approx(10.1), pytest.approx(10.1), "network")


def test_what_goes_along_several_axes_or_unknown_ones_has_the_slowest_link():
    several, unknown = collective("data", "fsdp", sent=1e10), collective(sent=1e10)
    for each in (several, unknown):
        assert estimate(Costs(0, 0, (each,), ()), CHIP, {"data"}).network == pytest.approx(10)
        assert estimate(Costs(0, 0, (each,), ()), CHIP, set()).network == pytest.approx(1)
