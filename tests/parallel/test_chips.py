"""Peak FLOPs a second by the name that jax gives a device."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from cpmjax.parallel.chips import peak_flops


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),  # also begins as TPU v5 does
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
    ],
)
def test_data_sheets(kind, peak):
    found, source = peak_flops(SimpleNamespace(device_kind=kind))
    assert found == peak
    assert source.startswith("data sheet of ") and kind.startswith(source.split(" of ")[1].split(",")[0])


def test_other_devices_are_measured():
    peak, source = peak_flops(jax.devices()[0])
    assert 1e8 < peak < 1e15
    assert "measured here" in source
