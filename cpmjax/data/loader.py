"""This host's rows, made in the background and placed on the mesh; time waited for them.

B rows a step, L tokens a row.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_AHEAD = 2  # batches made before they are asked for


class Loader:
    """An iterator of batches {name: array [B, L]} on the mesh; close it, or use it in a `with`.

    `batch_at(position, size)` makes rows position to position + size; each process asks only for the rows that its
    own devices hold. `wanted` is the position and the size (B) of each batch. What `batch_at` raises reaches the
    consumer with the batch that it belongs to.
    """

    def __init__(
        self,
        batch_at: Callable[[int, int], dict[str, np.ndarray]],
        wanted: Iterable[tuple[int, int]],
        sharding: NamedSharding,
    ) -> None:
        self.waited = 0.0  # seconds that the consumer has waited
        self._batch_at = batch_at
        self._wanted = iter(wanted)
        self._sharding = sharding
        self._by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._pending: deque[Future[dict[str, jax.Array]]] = deque()
        for _ in range(_AHEAD):
            self._prefetch()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        if not self._pending:
            raise StopIteration
        start = time.perf_counter()
        batch = self._pending.popleft().result()
        self.waited += time.perf_counter() - start
        self._prefetch()
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the background thread, after the batch that it is making."""
        self._pool.shutdown(cancel_futures=True)

    def _prefetch(self) -> None:
        for position, size in itertools.islice(self._wanted, 1):
            self._pending.append(self._pool.submit(self._make, position, size))

    def _make(self, position: int, size: int) -> dict[str, jax.Array]:
        # Which rows live here, whatever the sharding does with the other axis.
        local = self._by_row.addressable_devices_indices_map((size,)).values()
        here = {rows.indices(size)[:2] for (rows,) in filter(None, local)}
        parts = {(start, stop): self._batch_at(position + start, stop - start) for start, stop in here}

        def place(key: str, length: int) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                return parts[index[0].indices(size)[:2]][key][:, index[1]]

            return jax.make_array_from_callback((size, length), self._sharding, shard)

        first = next(iter(parts.values()))
        return {key: place(key, rows.shape[1]) for key, rows in first.items()}
