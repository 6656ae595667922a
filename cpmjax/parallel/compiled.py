"""Compiled programs: kept from one process to the next, and the memory of one, by the compiler's own analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax


def keep_compiled(cache: str | Path) -> None:
    """From now on this process keeps what it compiles in a folder of `cache`, and takes from there what is the same."""
    jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser() / "compiled"))
    # Also what compiles within a second: a start has many such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: int  # state and batch
    temporaries: int  # activations, gradients and workspace
    outputs: int  # beyond what reuses the arguments' memory

    @property
    def total(self) -> int:
        return sum(self)


def memory(compiled: Any) -> Memory:
    """Memory of a `jax.stages.Compiled`, known before it runs for the first time."""
    analysis = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes, max(0, outputs))


def device_memory(device: jax.Device) -> int | None:
    """Bytes the device has for programs, if it says so (a CPU does not)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def describe(used: Memory, limit: int | None) -> str:
    """One line; says so when the program does not fit."""
    parts = [f"{name} {size / 2**20:,.0f} MiB" for name, size in zip(used._fields, used, strict=True)]
    line = f"memory of the compiled step, each device: {used.total / 2**20:,.0f} MiB ({', '.join(parts)})"
    if limit is not None and used.total > limit:
        line += f": DOES NOT FIT the device's {limit / 2**20:,.0f} MiB"
    return line
