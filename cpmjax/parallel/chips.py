"""What an accelerator can do, by its data sheet: peak FLOPs, memory, and what it sends to others."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Chip:
    """One device as jax counts devices."""

    kinds: tuple[str, ...]  # how its name in jax begins
    flops: float  # dense bf16 products, a second
    memory: float  # bytes
    bandwidth: float  # bytes a second, between chip and memory
    link: float  # bytes a second that it sends along one axis of a mesh, within a slice (TPU) or a host (GPU)
    network: float  # bytes a second that it sends beyond it


# TPUs: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e). Of the links' bandwidth, printed for both directions and all
# axes of the torus, an axis of a mesh is taken to have that of one axis of the torus, one way. Network: NICs of a host
# over its chips; of v4 as of v5p. GPUs: NVIDIA's data sheets, SXM forms, without sparsity; NVLink (RTX 4090: PCIe 4.0
# x16) one way; network as in NVIDIA's DGX systems, one NIC a GPU of 200 (A100) or 400 Gbit/s (RTX 4090: 100).
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1228e9, 100e9, 6.25e9),
    "v5e": Chip(("TPU v5 lite",), 197e12, 16 * 2**30, 819e9, 100e9, 3.125e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2765e9, 200e9, 6.25e9),
    "v6e": Chip(("TPU v6 lite",), 918e12, 32 * 2**30, 1638e9, 200e9, 12.5e9),
    "a100": Chip(("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip(("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip(("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 50e9),
    "rtx4090": Chip(("NVIDIA GeForce RTX 4090",), 165e12, 24e9, 1008e9, 32e9, 12.5e9),
}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOPs a second, where the number is from): the data sheet, or on other devices a measured matrix product."""
    by_kind = {kind: chip for chip in CHIPS.values() for kind in chip.kinds if device.device_kind.startswith(kind)}
    if by_kind:
        kind = max(by_kind, key=len)  # "TPU v5 lite" also starts as "TPU v5" does
        return by_kind[kind].flops, f"data sheet of {kind}, bf16"
    size, repeats = 1024, 8
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(matrix, matrix).block_until_ready()
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    # The devices of a simulated mesh share one machine, so each has its share of what one product reaches.
    peak = 2 * size**3 / fastest / jax.local_device_count()
    return peak, f"measured here: float32 product of {size} x {size} matrices, best of {repeats}"
