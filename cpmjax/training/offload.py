"""What an optimizer knows of parameters, kept in the memory of hosts (`optimizer.offload`).

Between steps it lies in pinned memory beside the devices, which reach it by themselves; within the jitted step it is
fetched, leaf by leaf as it is needed, and what becomes of it is sent back. Counts stay on the devices.
"""

from __future__ import annotations

from typing import Any

import jax

from cpmjax.run.errors import UserError

PINNED = "pinned_host"


def on_host(abstract: Any) -> Any:
    """The `jax.ShapeDtypeStruct`s of a state, arrays of more than one number placed in the memory of hosts.

    Raises UserError if their devices have none.
    """

    def move(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.ndim == 0:
            return x
        device = x.sharding.mesh.devices.flat[0]
        kinds = {memory.kind for memory in device.addressable_memories()}
        if PINNED not in kinds:
            raise UserError(
                f"optimizer.offload = True: {device.device_kind} reaches {', '.join(sorted(kinds))}; "
                f"expected a device with {PINNED} memory"
            )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(PINNED))

    return jax.tree.map(move, abstract)


def offloaded(tree: Any) -> bool:
    """Whether any array of it, which may be traced, lies in the memory of hosts."""
    return any(_is_on_host(x) for x in jax.tree.leaves(tree))


def fetched(tree: Any) -> Any:
    """With all of its arrays on the device. For use in jit."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x, tree)


def _is_on_host(x: Any) -> bool:
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host
