"""Which attention mixes the rows of a batch: the one place that chooses, and that puts what it chose on a mesh.

B batch, L length, H heads, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from cpmjax.model import kernels
from cpmjax.model.attention import attend_rows, plain
from cpmjax.model.ring import ring
from cpmjax.parallel.sharding import RULES, partition, parts, splits
from cpmjax.run.config import Attention
from cpmjax.run.errors import UserError

_Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
_XLA: dict[str, _Attend] = {"plain": plain, "chunked": attend_rows}
_KERNELS: dict[str, _Attend] = {"splash": kernels.splash, "triton": kernels.triton, "cudnn": kernels.cudnn}
_PLATFORMS = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
_AXES = ("rows", "length", "heads", None)


def attention(
    choice: Attention, query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array
) -> jax.Array:
    """`attend_rows` by the implementation of that name. `auto` is

        ring      where the mesh of `jax.set_mesh` splits the length
        splash    on a TPU
        triton    on a GPU in 16 bits, if jax has it; cudnn's memory grows with the square of the length
        chunked   on a CPU, in 32 bits on a GPU, and where the mesh does not divide rows, length or heads

    XLA splits `plain` and `chunked` over a mesh by itself, the length, too. All others run on each device's own rows
    and heads, which the mesh must divide. The platform is the mesh's, which may be of devices that are not there, or
    jax's default where no mesh is set. Raises UserError for what is impossible here.
    """
    name = _best(query_BLHK) if choice == "auto" else choice
    if name in _XLA:
        return _XLA[name](query_BLHK, key_BLGK, value_BLGK, segments_BL)
    if key_BLGK.shape[2] % _parts("heads"):
        key_BLGK, value_BLGK = (kernels.repeat_heads(x, query_BLHK.shape[2]) for x in (key_BLGK, value_BLGK))
    if name == "ring":
        return ring(query_BLHK, key_BLGK, value_BLGK, segments_BL)
    if problem := _problem(name, query_BLHK):
        raise UserError(f"compute.attention = {name}: {problem}, or auto, chunked or plain")
    kernel = _KERNELS[name]
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(query_BLHK, key_BLGK, value_BLGK, segments_BL)
    heads, tokens = partition(_AXES), partition(_AXES[:2])
    on_each: _Attend = jax.shard_map(kernel, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return on_each(query_BLHK, key_BLGK, value_BLGK, segments_BL)


def _best(query_BLHK: jax.Array) -> str:
    if _undivided(query_BLHK):
        return "chunked"
    if splits("length"):
        return "ring"
    if _platform() == "tpu":
        return "splash"
    if _platform() == "gpu" and query_BLHK.dtype.itemsize == 2 and kernels.has_triton():
        return "triton"
    return "chunked"


def _problem(name: str, query_BLHK: jax.Array) -> str:
    """What keeps a kernel from these arrays, and what was expected; "" if nothing does."""
    if _platform() != _PLATFORMS[name]:
        return f"the devices are of platform {_platform()}, expected {_PLATFORMS[name]}"
    if splits("length"):
        return f"it takes whole rows, expected mesh.sequence = 1, not {_parts('length')}"
    if undivided := _undivided(query_BLHK):
        return undivided
    if name == "triton" and not kernels.has_triton():
        return f"jax {jax.__version__} lacks it, expected another jax"
    width = query_BLHK.shape[-1]
    if name == "cudnn" and (query_BLHK.dtype.itemsize != 2 or width % 8 or width > 128):
        return f"{query_BLHK.dtype} heads of width {width}, expected bfloat16 and a multiple of 8 up to 128"
    return ""


def _undivided(query_BLHK: jax.Array) -> str:
    """What the mesh does not divide; "" if nothing."""
    for size, axis in zip(query_BLHK.shape, _AXES, strict=True):
        if axis and size % _parts(axis):
            return f"{size} {axis}, expected a multiple of mesh {' x '.join(RULES[axis])} = {_parts(axis)}"
    return ""


def _parts(axis: str) -> int:
    return parts(jax.sharding.get_abstract_mesh(), axis)


def _platform() -> str:
    """cpu, gpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
