"""Load, store and sum rows in the registers of a GPU."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxnorm.kernels.gpu.tiles import LANES, WARPS, Tile


class Rows(Tile):
    """A tile with the operations that load, store and sum it.

    Arrays of rows are handled as arrays of segments; a row of one segment is its segment.
    """

    @property
    def layout(self) -> Any:
        """Return the assignment of elements to lanes: a segment belongs to one warp."""
        tiling = plgpu.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)

    def segment(self) -> Any:
        """Return the number of this warpgroup's first segment of a row."""
        return lax.axis_index("warpgroup") * WARPS if self.segments > 1 else 0

    def load(self, ref: Any, start: Any) -> jax.Array:
        """Load rows of an array, in float32."""
        return _load(ref.at[self._slice(start), :], self.layout).astype(jnp.float32)

    def store(self, ref: Any, start: Any, a: jax.Array) -> None:
        """Store rows: the inverse of `load`."""
        store(ref.at[self._slice(start), :], a.astype(ref.dtype))

    def load_param(self, ref: Any) -> jax.Array:
        """Load a number for each feature, and broadcast it to all elements."""
        if self.segments > 1:
            return self.load(ref, 0)
        return self._broadcast_in_dim(_load(ref.at[0, :], self.layout.reduce(0)), 1)

    def load_statistic(self, ref: Any, start: Any) -> jax.Array:
        """Load a number for each row."""
        if self.segments > 1:
            return ref[start]
        return _load(ref.at[pl.ds(start, self.rows)], self.layout.reduce(1))

    def store_statistic(self, ref: Any, start: Any, a: jax.Array) -> None:
        """Store a number for each row: the inverse of `load_statistic`."""
        if self.segments == 1:
            store(ref.at[pl.ds(start, self.rows)], a)
            return

        @pl.when(lax.axis_index("warpgroup") == 0)  # all warpgroups hold the same number
        def _():
            ref[start] = a

    def broadcast(self, a: jax.Array) -> jax.Array:
        """Broadcast a number for each row to all elements."""
        return a if self.segments > 1 else self._broadcast_in_dim(a, 0)

    def means(self, shared: Any, slot: Any, *arrays: jax.Array) -> list[jax.Array]:
        """Return the mean of each row, for each array.

        Args:
          shared: shared memory and a barrier, if rows have several segments.
          slot: 0 and 1 in turn, so that no warpgroup overwrites what another still reads.
          *arrays: up to two arrays.
        """
        sums = [jnp.sum(a, axis=1) for a in arrays]
        if self.segments > 1:
            memory, barrier = shared
            offset = lambda number: (2 * slot + number) * self.segments
            for number, a in enumerate(sums):
                memory[pl.ds(offset(number) + self.segment(), WARPS)] = a
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            total = lambda start: functools.reduce(
                operator.add, (memory[start + segment] for segment in range(self.segments))
            )
            sums = [total(offset(number)) for number in range(len(arrays))]
        return [a / self.k for a in sums]

    def _slice(self, start):
        return pl.ds(start * self.segments + self.segment(), self.shape[0])

    def _broadcast_in_dim(self, a, axis):
        return plgpu.layout_cast(lax.broadcast_in_dim(a, self.shape, (axis,)), self.layout)


def _load(ref: Any, layout: Any) -> jax.Array:
    load: Any = plgpu.load  # its type differs in the oldest supported jax
    return load(ref, layout=layout, optimized=False)  # only shared memory has optimized loads


def store(ref: Any, a: jax.Array) -> None:
    """Write to memory, also less than 32 bytes, such as the statistics of four rows.

    From jax 0.12 on, such a store is an error unless `optimized=False`.
    """
    pallas: Any = plgpu
    if hasattr(pallas, "store"):
        pallas.store(ref, a, optimized=False)
    else:
        ref[...] = a
