"""Which elements share statistics: static and hashable.

The norms differ only in their `Layout`. Statistics keep the reduction axes with size one, so that
they broadcast. Group norm divides its feature axis into groups, and ghost batch norm divides its
batch axis into sub-batches: along that axis, the statistics have one element for each part. x is
never reshaped into parts. On a TPU, XLA would copy x if a part does not fill a tile of memory.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._internals import is_sharded
from jaxnorm.core.arithmetic import as_array
from jaxnorm.core.sums import repeat, sum_axes, sums

SAMPLE_STRIDE = 8  # one of 8 elements is in the sample
MIN_SAMPLED = 128  # fewer elements are not sampled
TPU_TILE = 128  # elements in a row of a TPU's tile


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of statistics and parameters in an array of one shape.

    Attributes:
      shape: the shape of x.
      reduction_axes: axes of x over which statistics are shared.
      feature_axes: axes of x that scale and bias span.
      split: one of the reduction axes, if statistics are shared only within equal parts of it.
      parts: how many parts that axis has.
      arguments: the caller's names for the axes of the features, for errors.
    """

    shape: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    feature_axes: tuple[int, ...]
    split: int | None = None
    parts: int = 1
    arguments: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def sub_batches(self) -> bool:
        """Whether the batch axis is split, so that each part has its own statistics."""
        return self.split is not None and self.split not in self.feature_axes

    @property
    def rows(self) -> bool:
        """Whether the elements that share statistics are the last axis, or several."""
        ndim = len(self.shape)
        last = tuple(range(ndim - len(self.reduction_axes), ndim))
        return self.split is None and self.reduction_axes == last

    @property
    def count(self) -> int:
        """How many elements share one mean and variance, where nothing is masked."""
        return math.prod(self.shape[axis] for axis in self.reduction_axes) // self.parts

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """The shape of the statistics: that of x, with reduction axes of size one."""
        shape = [1 if axis in self.reduction_axes else n for axis, n in enumerate(self.shape)]
        if self.split is not None:
            shape[self.split] = self.parts
        return tuple(shape)

    @functools.cached_property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of scale and bias: the sizes of their axes of x, in the order of x."""
        return tuple(self.shape[axis] for axis in self.feature_axes)

    @functools.cached_property
    def block(self) -> tuple[int, int, int, int] | None:
        """x in memory as (n, s, g, k), or None if its axes are in another order.

        n independent examples, s positions, g groups of k features: statistics are shared over s
        and k, parameters span g and k.
        """
        sizes = [1, 1, 1, 1]
        last = 0
        for axis, size in enumerate(self.shape):
            if not isinstance(size, int):
                return None  # a symbolic shape, of jax.export
            reduced, features = axis in self.reduction_axes, 2 * (axis in self.feature_axes)
            pieces = [(size, reduced + features)]
            if axis == self.split:
                pieces = [(self.parts, features), (size // self.parts, 1 + features)]
            for length, place in pieces:
                if length == 1:
                    continue
                if place < last:
                    return None
                last = place
                sizes[place] *= length
        return sizes[0], sizes[1], sizes[2], sizes[3]

    def param_blocks(self, shape: tuple[int, ...]) -> int | None:
        """Return into how many equal runs of examples a parameter of that shape divides x.

        Within a run it depends on the features alone. None if it depends on other axes too.
        """
        if shape == self.feature_shape:
            return 1
        blocks, ended = 1, False
        for axis, (size, full) in enumerate(zip(shape, self.shape, strict=True)):
            if axis in self.feature_axes:
                if size != full:
                    return None
            elif size != full:
                ended = True
            elif full != 1:
                if ended or axis in self.reduction_axes:
                    return None
                blocks *= full
        return blocks

    def sum(self, a: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Sum an array of the shape of x over the elements that share statistics."""
        return self.sums((a,), where)[0]

    def sums(
        self, arrays: Sequence[jax.Array], where: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Sum several arrays in the same way."""
        return tuple(map(self._of_parts, sums(arrays, self._whole_axes, where)))

    def _of_parts(self, a: jax.Array) -> jax.Array:
        if self.split is None:
            return a
        before, after = a.shape[: self.split], a.shape[self.split + 1 :]
        size = a.shape[self.split] // self.parts
        return sum_axes(a.reshape(*before, self.parts, size, *after), (self.split + 1,))

    def repeat(self, a: jax.Array, x: jax.Array) -> jax.Array:
        """Repeat what the elements of such a sum share, so that it broadcasts against x."""
        return repeat(a, x, self._whole_axes)

    @property
    def _whole_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis in self.reduction_axes if axis != self.split)

    def broadcast_statistics(self, statistic: jax.Array) -> jax.Array:
        """Reshape a statistic so that it broadcasts against x."""
        if self.split is None or statistic.shape[self.split] == 1:
            return statistic
        size = self.shape[self.split] // self.parts
        one = jnp.expand_dims(statistic, self.split + 1)
        shape = (*one.shape[: self.split + 1], size, *one.shape[self.split + 2 :])
        many = jnp.broadcast_to(one, shape)
        return many.reshape(*shape[: self.split], self.parts * size, *shape[self.split + 2 :])

    def sample(self, x: jax.Array) -> jax.Array:
        """Take a sample of an eighth or more of the elements that share statistics.

        Along the last axis, take the eighth in the middle, because memory is read in pieces of 32
        bytes or more; along another axis, take every eighth index. Return all of x if the shape is
        symbolic, if each axis is split or sharded explicitly, or if the elements are few, because
        the mean of a small sample may be far off.
        """
        whole = lambda axis: axis != self.split and not is_sharded(x, axis)
        axes = [axis for axis in self.reduction_axes if whole(axis)]
        if (
            not axes
            or not isinstance(self.count, int)
            or self.count < MIN_SAMPLED
            or 0 in self.shape
        ):
            return x
        last = x.ndim - 1
        # The batch comes last but for the features: it may be sharded.
        rank = lambda axis: (
            min(self.shape[axis], SAMPLE_STRIDE - 1),
            axis != last,
            axis != 0,
            -axis,
        )
        axis = max(axes, key=rank)
        size = self.shape[axis]
        length = -(-size // SAMPLE_STRIDE)
        if axis != last:
            return lax.slice_in_dim(x, (size - 1) % SAMPLE_STRIDE // 2, size, SAMPLE_STRIDE, axis)
        start = (size - length) // 2
        # Where the eighth is at least one row of a TPU's tile, it starts with a tile.
        start -= start % TPU_TILE if length >= TPU_TILE else 0
        return lax.slice_in_dim(x, start, start + length, 1, axis)

    def broadcast(self, param: jax.Array) -> jax.Array:
        """Reshape a scale, bias or running statistic so that it broadcasts against x.

        Its shape is that of the features, or has the rank of x.
        """
        if param.shape != self.feature_shape:
            return param
        axes = self.feature_axes
        return param.reshape([size if axis in axes else 1 for axis, size in enumerate(self.shape)])

    def mask(self, where: ArrayLike | None) -> jax.Array | None:
        """Check `where`, and reshape it so that it broadcasts against x."""
        if where is None:
            return None
        where = as_array(where)
        if where.dtype != bool:
            raise TypeError(
                f"where must be boolean (True counts in the statistics), got dtype {where.dtype}; "
                "compare first, for example where=lengths > position."
            )
        if not _broadcasts(where.shape, self.shape):
            raise ValueError(
                f"where must broadcast to x: x has shape {self.shape}, where has shape "
                f"{where.shape}; add axes of size one where x has axes that where lacks."
            )
        return where.reshape((1,) * (len(self.shape) - where.ndim) + where.shape)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, full) for size, full in pairs)
