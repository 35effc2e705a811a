"""Rows in the registers of a GPU: loaded, stored, and summed."""

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
    """A tile, and how it is loaded, stored and summed.

    Arrays of rows are handled as arrays of segments, which are rows if a row has one.
    """

    @property
    def layout(self) -> Any:
        """Which lane has which elements: a segment belongs to one warp."""
        tiling = plgpu.Tiling(((WARPS, LANES * self.vector), (self.vector,)))
        return plgpu.Layout.TILED(tiling, (-3,), (-2,), -1)

    def segment(self) -> Any:
        """The first segment of a row that this warpgroup has."""
        return lax.axis_index("warpgroup") * WARPS if self.segments > 1 else 0

    def load(self, ref: Any, start: Any) -> jax.Array:
        """Rows of an array, in float32."""
        return _load(ref.at[self._slice(start), :], self.layout).astype(jnp.float32)

    def store(self, ref: Any, start: Any, a: jax.Array) -> None:
        """The inverse of `load`."""
        store(ref.at[self._slice(start), :], a.astype(ref.dtype))

    def load_param(self, ref: Any) -> jax.Array:
        """A number for each feature, for each element."""
        if self.segments > 1:
            return self.load(ref, 0)
        return self._wide(_load(ref.at[0, :], self.layout.reduce(0)), 1)

    def load_statistic(self, ref: Any, start: Any) -> jax.Array:
        """A number for each row."""
        if self.segments > 1:
            return ref[start]
        return _load(ref.at[pl.ds(start, self.rows)], self.layout.reduce(1))

    def store_statistic(self, ref: Any, start: Any, a: jax.Array) -> None:
        """The inverse of `load_statistic`."""
        if self.segments == 1:
            store(ref.at[pl.ds(start, self.rows)], a)
            return

        @pl.when(lax.axis_index("warpgroup") == 0)  # all have the same
        def _():
            ref[start] = a

    def broadcast(self, a: jax.Array) -> jax.Array:
        """A number for each row, for each element."""
        return a if self.segments > 1 else self._wide(a, 0)

    def means(self, shared: Any, slot: Any, *arrays: jax.Array) -> list[jax.Array]:
        """The mean of each row, of each of the arrays.

        Args:
          shared: shared memory and a barrier, if rows have segments.
          slot: 0 and 1 in turns, so that no warpgroup writes what another still reads.
          *arrays: up to two.
        """
        sums = [jnp.sum(a, axis=1) for a in arrays]
        if self.segments > 1:
            memory, barrier = shared
            place = lambda number: (2 * slot + number) * self.segments
            for number, a in enumerate(sums):
                memory[pl.ds(place(number) + self.segment(), WARPS)] = a
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            total = lambda at: functools.reduce(
                operator.add, (memory[at + segment] for segment in range(self.segments))
            )
            sums = [total(place(number)) for number in range(len(arrays))]
        return [a / self.k for a in sums]

    def _slice(self, start):
        return pl.ds(start * self.segments + self.segment(), self.shape[0])

    def _wide(self, a, axis):
        return plgpu.layout_cast(lax.broadcast_in_dim(a, self.shape, (axis,)), self.layout)


def _load(ref: Any, layout: Any) -> jax.Array:
    load: Any = plgpu.load  # the oldest jax that jaxnorm supports types it otherwise
    return load(ref, layout=layout, optimized=False)  # only shared memory has optimized loads


def store(ref: Any, a: jax.Array) -> None:
    """Write to memory; from jax 0.12 on, a store is an error unless it fills sectors of 32 bytes.

    Statistics of four rows have 16.
    """
    pallas: Any = plgpu
    if hasattr(pallas, "store"):
        pallas.store(ref, a, optimized=False)
    else:
        ref[...] = a
