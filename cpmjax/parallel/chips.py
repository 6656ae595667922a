"""Peak FLOPs a second of a chip: the denominator of MFU."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bf16 peak of one device as jax counts devices. Sources: the vendors' data sheets (cloud.google.com/tpu/docs,
# NVIDIA A100, H100 and H200 data sheets), SXM forms, without sparsity.
PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOPs a second, where the number is from): the data sheet, or on other devices a measured matrix product."""
    kinds = [kind for kind in PEAK_BF16_FLOPS if device.device_kind.startswith(kind)]
    if kinds:
        kind = max(kinds, key=len)  # "TPU v5 lite" also starts as "TPU v5" does
        return PEAK_BF16_FLOPS[kind], f"data sheet of {kind}, bf16"
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
