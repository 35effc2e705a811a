"""Which elements share statistics: static, hashable, checked once for each shape and axes.

The norms differ only in their `Layout`. Group norm splits its feature axis into (groups, features
of a group), and ghost batch norm its batch axis into (sub-batches, examples of a sub-batch); every
other norm views the array as it is. All later code works on that view, and on statistics that keep
the reduction axes with size one, so that they broadcast.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar, cast

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arithmetic import as_array
from jaxnorm.core.axes import Axes, canonical_axes, check_divisor, other_axes

F = TypeVar("F", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of statistics and parameters in an array of one shape.

    Attributes:
      shape: the shape of x.
      view: the shape after splitting the axis `split` in two; else `shape`.
      reduction_axes: axes of the view over which statistics are shared.
      feature_axes: axes of the view that scale and bias span.
      split: the first of the two axes of the view that are one axis of `shape`, or None.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    feature_axes: tuple[int, ...]
    split: int | None = None

    @property
    def sub_batches(self) -> bool:
        """Whether the batch axis is split, so that each part has its own statistics."""
        return self.split is not None and self.split not in self.feature_axes

    @property
    def count(self) -> int:
        """How many elements share one mean and variance, where nothing is masked."""
        return math.prod(self.view[axis] for axis in self.reduction_axes)

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """The shape of the statistics: that of the view, with reduction axes of size one."""
        axes = self.reduction_axes
        return tuple(1 if axis in axes else size for axis, size in enumerate(self.view))

    @functools.cached_property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of scale and bias: the sizes of their axes of x, in the order of x."""
        sizes = tuple(self.view[axis] for axis in self.feature_axes)
        # The groups and the features of a group are one axis of x.
        return (math.prod(sizes),) if self.split in self.feature_axes else sizes

    @functools.cached_property
    def block(self) -> tuple[int, int, int, int] | None:
        """The view in memory as (n, s, g, k), or None if its axes are in another order.

        n independent examples, s positions, g groups of k features: statistics are shared over s
        and k, parameters span g and k.
        """
        sizes = [1, 1, 1, 1]
        last = 0
        for axis, size in enumerate(self.view):
            if not isinstance(size, int):
                return None  # a symbolic shape, of jax.export
            if size == 1:
                continue
            place = (axis in self.reduction_axes) + 2 * (axis in self.feature_axes)
            if place < last:
                return None
            last = place
            sizes[place] *= size
        return sizes[0], sizes[1], sizes[2], sizes[3]

    def broadcast(self, param: jax.Array) -> jax.Array:
        """A scale, bias or running statistic, reshaped to broadcast against the view."""
        axes = self.feature_axes
        return param.reshape([size if axis in axes else 1 for axis, size in enumerate(self.view)])

    def mask(self, where: ArrayLike | None) -> jax.Array | None:
        """`where`, checked and reshaped to broadcast against the view."""
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
        where = where.reshape((1,) * (len(self.shape) - where.ndim) + where.shape)
        if self.split is None:
            return where
        axis = self.split
        parts = (1, 1) if where.shape[axis] == 1 else self.view[axis : axis + 2]
        return where.reshape(where.shape[:axis] + parts + where.shape[axis + 1 :])


def once_per_kind(function: F) -> F:
    """Remember the results of a function of static arguments, which need not be checked again.

    Arguments that can't be compared are not remembered: lists, and the symbolic sizes of
    jax.export.
    """
    remembered = functools.lru_cache(maxsize=4096, typed=True)(function)

    @functools.wraps(function)
    def call(shape, *args, **kwargs):
        if all(type(size) is int for size in shape):
            try:
                return remembered(shape, *args, **kwargs)
            except TypeError:  # an argument is a list, or wrong: then this raises again
                pass
        return function(shape, *args, **kwargs)

    return cast(F, call)


def make_layout(
    shape: tuple[int, ...],
    *,
    reduction_axes: Axes,
    feature_axes: Axes,
    split: int | None = None,
    parts: int = 1,
) -> Layout:
    """A layout for x of that shape, by the axes of x.

    If `split` is given, that axis is divided into so many equal `parts`, and statistics are shared
    only within each part.
    """
    reduction_axes = canonical_axes(reduction_axes, len(shape))
    feature_axes = canonical_axes(feature_axes, len(shape))
    if split is None:
        return Layout(shape, shape, reduction_axes, feature_axes)
    view = (*shape[:split], parts, shape[split] // parts, *shape[split + 1 :])
    features = tuple(axis + (axis > split) for axis in feature_axes)
    if split in feature_axes:
        features = tuple(sorted((*features, split + 1)))
    reduced = tuple(axis + (axis >= split) for axis in reduction_axes)
    return Layout(shape, view, reduced, features, split)


@once_per_kind
def moments_layout(shape: tuple[int, ...], axis: Axes) -> Layout:
    """Statistics over the given axes, and no parameters."""
    return make_layout(shape, reduction_axes=axis, feature_axes=())


@once_per_kind
def layer_layout(shape: tuple[int, ...], axes: Axes, feature_axes: Axes | None = None) -> Layout:
    """Statistics over the axes, and parameters along those or along `feature_axes`."""
    if feature_axes is None:
        return make_layout(shape, reduction_axes=axes, feature_axes=axes)
    reduced = canonical_axes(axes, len(shape), "reduction_axes")
    features = canonical_axes(feature_axes, len(shape), "feature_axes")
    return make_layout(shape, reduction_axes=reduced, feature_axes=features)


@once_per_kind
def batch_layout(
    shape: tuple[int, ...],
    feature_axes: Axes,
    virtual_batch_size: int | None = None,
    name: str = "feature_axis",
) -> Layout:
    """Statistics of each feature, over all other axes or within sub-batches of that size.

    Raises:
      ValueError: the size does not divide the batch, which is the first axis without features.
    """
    features = canonical_axes(feature_axes, len(shape), name)
    others = other_axes(features, len(shape))
    if virtual_batch_size is None:
        return make_layout(shape, reduction_axes=others, feature_axes=features)
    if not others:
        raise ValueError(
            f"x must have a batch axis that virtual_batch_size divides, got shape {shape} of "
            "features alone; put a batch axis in front of x."
        )
    batch = others[0]
    size = check_divisor(virtual_batch_size, shape[batch], "virtual_batch_size", "examples")
    return make_layout(
        shape,
        reduction_axes=others,
        feature_axes=features,
        split=batch,
        parts=shape[batch] // size,
    )


@once_per_kind
def instance_layout(
    shape: tuple[int, ...], feature_axes: Axes, name: str = "feature_axis"
) -> Layout:
    """Statistics of each example, along the first axis, and each feature."""
    features = canonical_axes(feature_axes, len(shape), name)
    if 0 in features:
        raise ValueError(
            f"{name} must leave out the first axis, which holds the examples, got {feature_axes!r} "
            f"for x of shape {shape}; put a batch axis in front of x."
        )
    positions = other_axes(features, len(shape), start=1)
    return make_layout(shape, reduction_axes=positions, feature_axes=features)


@once_per_kind
def group_layout(
    shape: tuple[int, ...],
    num_groups: int,
    feature_axis: int = -1,
    reduction_axes: Axes | None = None,
) -> Layout:
    """Statistics of each group of features, by default of each example by itself.

    An array that has only a feature axis is one example.

    Raises:
      ValueError: the groups do not divide the features, or the axes are not those of one example.
    """
    (axis,) = canonical_axes((feature_axis,), len(shape), "feature_axis")
    if reduction_axes is None:
        positions = instance_layout(shape, axis).reduction_axes if len(shape) > 1 else ()
        reduction_axes = (*positions, axis)
    elif axis not in canonical_axes(reduction_axes, len(shape), "reduction_axes"):
        raise ValueError(
            f"reduction_axes must hold the feature axis, {axis}, got {reduction_axes!r} for x of "
            f"shape {shape}; add it."
        )
    num_groups = check_divisor(num_groups, shape[axis], "num_groups")
    return make_layout(
        shape, reduction_axes=reduction_axes, feature_axes=axis, split=axis, parts=num_groups
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, full) for size, full in pairs)
