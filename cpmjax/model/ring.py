"""Ring attention (Liu, Zaharia & Abbeel 2023): for rows whose length is split over devices, by `RULES["length"]`.

Every device keeps its queries; keys and values go around, and each device adds what its queries see of them (online
softmax in float32; Dao et al. 2022, FlashAttention). Of the scores those of one chunk of queries and one chunk of keys
exist at a time. For the backward pass a device keeps no more than its own queries, keys, values and results; there the
gradients of keys and values go around with them. Chunks that see nothing of each other, in the future or in other
documents, are left out, and nothing balances the load: the device with the ends of rows has the most to do.

B batch, L length, H heads, G key-value heads, R heads per key-value head, K head width, N chunks, C queries and S keys
of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpmjax.model.attention import CHUNK, Places
from cpmjax.parallel.sharding import RULES, partition

_TOKENS = ("rows", "length")
_HEADS = (*_TOKENS, "heads")
_NEVER = 2**31 - 1  # a slot that comes after all slots
T = TypeVar("T")


class _Queries(NamedTuple):
    """What stays, in chunks."""

    query_BGRCK: jax.Array
    places: Places


class _Results(NamedTuple):
    """What a backward pass knows of its queries beside them, in chunks."""

    gradient_BGRCK: jax.Array
    logsumexp_BGRC: jax.Array
    delta_BGRC: jax.Array  # the sum of gradient times result: what the softmax takes off the slope of every score


class _Keys(NamedTuple):
    """What goes around, in chunks."""

    key_BSGK: jax.Array
    value_BSGK: jax.Array
    places: Places


class _Softmax(NamedTuple):
    """Of the keys seen so far, float32."""

    mixed_BGRCK: jax.Array
    maximum_BGRC: jax.Array
    total_BGRC: jax.Array


_Pair = tuple[jax.Array, jax.Array]  # gradients of keys and values
_Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of queries, keys and values


@jax.custom_vjp
def ring(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """`attend_rows` of whole rows under `jax.set_mesh`, whose axes must divide rows, length and key-value heads."""
    return _forward(query_BLHK, key_BLGK, value_BLGK, segments_BL)[0]


def _forward(query_BLHK: jax.Array, key_BLGK: jax.Array, value_BLGK: jax.Array, segments_BL: jax.Array) -> Any:
    heads, tokens, sums = partition((*_HEADS, None)), partition(_TOKENS), partition(_HEADS)
    attend: Callable[..., Any] = jax.shard_map(
        _attend, in_specs=(heads, heads, heads, tokens, tokens), out_specs=(heads, sums), check_vma=False
    )
    slots_BL = jnp.broadcast_to(jnp.arange(segments_BL.shape[1], dtype=jnp.int32), segments_BL.shape)
    # The barrier: a scan over layers would work out beforehand what does not depend on the layer, which is who sees
    # whom, and hold that of all chunks at one time.
    arrays = jax.lax.optimization_barrier((query_BLHK, key_BLGK, value_BLGK, segments_BL, slots_BL))
    mixed_BLHK, logsumexp_BLH = attend(*arrays)
    mixed_BLHK, logsumexp_BLH = checkpoint_name(mixed_BLHK, "mixed"), checkpoint_name(logsumexp_BLH, "total")
    return mixed_BLHK, (*arrays, mixed_BLHK, logsumexp_BLH)


def _backward(kept: tuple[jax.Array, ...], mixed_gradient_BLHK: jax.Array) -> tuple[jax.Array | None, ...]:
    heads, tokens, sums = partition((*_HEADS, None)), partition(_TOKENS), partition(_HEADS)
    gradients: Callable[..., Any] = jax.shard_map(
        _gradients,
        in_specs=(heads, heads, heads, tokens, tokens, heads, sums, heads),
        out_specs=(heads, heads, heads),
        check_vma=False,
    )
    return *gradients(*kept, mixed_gradient_BLHK), None


ring.defvjp(_forward, _backward)


# ---- on one device ---------------------------------------------------------------------------------------------------


def _attend(query_BLHK, key_BLGK, value_BLGK, segments_BL, slots_BL):
    groups, places = key_BLGK.shape[2], Places(segments_BL, slots_BL)
    queries = _Queries(_grouped(query_BLHK, groups), _chunked_places(places))
    keys = _Keys(_chunks(key_BLGK), _chunks(value_BLGK), queries.places)
    nothing = jnp.zeros(queries.query_BGRCK.shape, jnp.float32)
    softmax = _Softmax(nothing, jnp.full(nothing.shape[:-1], -1e30), nothing[..., 0])

    def meet(queries: _Queries, keys: _Keys, softmax: _Softmax) -> _Softmax:
        scores_BGRCS = _scores(queries, keys)
        maximum_BGRC = jnp.maximum(softmax.maximum_BGRC, jnp.max(scores_BGRCS, axis=-1))
        weights_BGRCS = jnp.exp(scores_BGRCS - maximum_BGRC[..., None])
        shrunk_BGRC = jnp.exp(softmax.maximum_BGRC - maximum_BGRC)
        return _Softmax(
            softmax.mixed_BGRCK * shrunk_BGRC[..., None]
            + _product("bgrcs,bsgk->bgrck", weights_BGRCS, keys.value_BSGK),
            maximum_BGRC,
            softmax.total_BGRC * shrunk_BGRC + jnp.sum(weights_BGRCS, axis=-1),
        )

    def add(keys: _Keys, softmax: _Softmax) -> _Softmax:
        def each(part: tuple[_Queries, _Softmax]) -> _Softmax:
            queries, softmax = part
            return jax.lax.scan(lambda softmax, keys: (_if_seen(meet, queries, keys, softmax), None), softmax, keys)[0]

        return jax.lax.map(each, (queries, softmax))

    def turn(carry: tuple[_Keys, _Softmax], _: None) -> tuple[tuple[_Keys, _Softmax], None]:
        return (_onward(carry[0]), add(*carry)), None

    carry, _ = jax.lax.scan(turn, (keys, softmax), length=_devices() - 1)
    softmax = add(*carry)
    mixed_NBGRCK = softmax.mixed_BGRCK / softmax.total_BGRC[..., None]
    logsumexp_NBGRC = softmax.maximum_BGRC + jnp.log(softmax.total_BGRC)
    length = query_BLHK.shape[1]
    return _whole(mixed_NBGRCK, length).astype(query_BLHK.dtype), _whole(logsumexp_NBGRC[..., None], length)[..., 0]


def _gradients(query_BLHK, key_BLGK, value_BLGK, segments_BL, slots_BL, mixed_BLHK, logsumexp_BLH, mixed_gradient_BLHK):
    groups, places = key_BLGK.shape[2], Places(segments_BL, slots_BL)
    delta_BLH = jnp.sum(mixed_BLHK.astype(jnp.float32) * mixed_gradient_BLHK.astype(jnp.float32), axis=-1)
    queries = _Queries(_grouped(query_BLHK, groups), _chunked_places(places))
    sums = (_grouped(x_BLH[..., None], groups)[..., 0] for x_BLH in (logsumexp_BLH, delta_BLH))
    results = _Results(_grouped(mixed_gradient_BLHK, groups), *sums)
    keys = _Keys(_chunks(key_BLGK), _chunks(value_BLGK), queries.places)
    scale = 1 / math.sqrt(query_BLHK.shape[-1])

    def meet(queries: _Queries, keys: _Keys, results: _Results, gradients: _Gradients) -> _Gradients:
        query_BGRCK, key_BSGK, value_BSGK = gradients
        weights_BGRCS = jnp.exp(_scores(queries, keys) - results.logsumexp_BGRC[..., None])
        value_BSGK += _product("bgrcs,bgrck->bsgk", weights_BGRCS, results.gradient_BGRCK)
        slopes_BGRCS = _product("bgrck,bsgk->bgrcs", results.gradient_BGRCK, keys.value_BSGK)
        slopes_BGRCS = weights_BGRCS * (slopes_BGRCS - results.delta_BGRC[..., None]) * scale
        query_BGRCK += _product("bgrcs,bsgk->bgrck", slopes_BGRCS, keys.key_BSGK)
        key_BSGK += _product("bgrcs,bgrck->bsgk", slopes_BGRCS, queries.query_BGRCK)
        return query_BGRCK, key_BSGK, value_BSGK

    def add(keys: _Keys, of_keys: _Pair, of_queries: jax.Array) -> tuple[_Pair, jax.Array]:
        def each(of_keys: _Pair, part: tuple[_Queries, _Results, jax.Array]) -> tuple[_Pair, jax.Array]:
            queries, results, of_query = part

            def inner(of_query: jax.Array, part: tuple[_Keys, _Pair]) -> tuple[jax.Array, _Pair]:
                keys, of_key = part
                gradients: _Gradients = _if_seen(meet, queries, keys, results, (of_query, *of_key))
                return gradients[0], gradients[1:]

            of_query, of_keys = jax.lax.scan(inner, of_query, (keys, of_keys))
            return of_keys, of_query

        return jax.lax.scan(each, of_keys, (queries, results, of_queries))

    def turn(carry: tuple[_Keys, _Pair, jax.Array], _: None) -> tuple[tuple[_Keys, _Pair, jax.Array], None]:
        keys = carry[0]
        of_keys, of_queries = add(*carry)
        return (_onward(keys), _onward(of_keys), of_queries), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (keys[:2], queries.query_BGRCK))
    carry, _ = jax.lax.scan(turn, (keys, *zeros), length=_devices() - 1)
    of_keys, of_queries = add(*carry)
    length = query_BLHK.shape[1]
    of_key, of_value = (
        x_NBSGK.swapaxes(0, 1).reshape(len(key_BLGK), -1, *key_BLGK.shape[2:])[:, :length].astype(key_BLGK.dtype)
        for x_NBSGK in _onward(of_keys)  # home
    )
    return _whole(of_queries, length).astype(query_BLHK.dtype), of_key, of_value


def _if_seen(meet: Callable[..., T], queries: _Queries, keys: _Keys, *rest: Any) -> T:
    """`meet`, or what there was before it, the last argument, if no query sees a key."""
    seen = jnp.any(_visible(queries.places, keys.places))
    return jax.lax.cond(seen, meet, lambda *arguments: arguments[-1], queries, keys, *rest)


def _visible(queries: Places, keys: Places) -> jax.Array:
    same_document_BCS = queries.segments[:, :, None] == keys.segments[:, None, :]
    return same_document_BCS & (queries.slots[:, :, None] >= keys.slots[:, None, :])


def _scores(queries: _Queries, keys: _Keys) -> jax.Array:
    scores_BGRCS = _product("bgrck,bsgk->bgrcs", queries.query_BGRCK, keys.key_BSGK)
    scores_BGRCS = scores_BGRCS / math.sqrt(queries.query_BGRCK.shape[-1])
    # Before a query has met itself its sum may be one over such floors: that vanishes beside the first real score.
    return jnp.where(_visible(queries.places, keys.places)[:, None, None], scores_BGRCS, -1e30)


def _product(indices: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """In the type of what the model computes, the right side's, summed in float32."""
    return jnp.einsum(indices, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


def _devices() -> int:
    return jax.lax.axis_size(RULES["length"])


def _onward(tree: T) -> T:
    """Each device's to the next one."""
    following = [(here, (here + 1) % _devices()) for here in range(_devices())]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, RULES["length"], following), tree)


def _chunks(x_BL: jax.Array, beyond: int = 0) -> jax.Array:
    """[B, L, ...] -> [N, B, C, ...], filled up with `beyond`."""
    batch, length = x_BL.shape[:2]
    chunk = min(CHUNK, length)
    padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BL.ndim - 2)
    padded = jnp.pad(x_BL, padding, constant_values=beyond)
    return padded.reshape(batch, -1, chunk, *x_BL.shape[2:]).swapaxes(0, 1)


def _chunked_places(places: Places) -> Places:
    return Places(_chunks(places.segments), _chunks(places.slots, beyond=_NEVER))


def _grouped(x_BLHK: jax.Array, groups: int) -> jax.Array:
    """[B, L, H, K] -> [N, B, G, R, C, K]."""
    x_NBCHK = _chunks(x_BLHK)
    return x_NBCHK.reshape(*x_NBCHK.shape[:3], groups, -1, x_BLHK.shape[-1]).transpose(0, 1, 3, 4, 2, 5)


def _whole(x_NBGRCK: jax.Array, length: int) -> jax.Array:
    """Back to [B, L, H, K]."""
    chunks, batch, groups, repeats, chunk, width = x_NBGRCK.shape
    x_BLHK = x_NBGRCK.transpose(1, 0, 4, 2, 3, 5).reshape(batch, chunks * chunk, groups * repeats, width)
    return x_BLHK[:, :length]
