"""Which elements share statistics: static, hashable, checked at the door.

A norm differs from its siblings only in its `Layout`. Group norm splits its feature axis into
(groups, features of a group), ghost batch norm its batch axis into (sub-batches, examples of a
sub-batch); every other norm views the array as it is. All later code works on that view and on
statistics that keep the shared axes with size one, so that they broadcast.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Axes = int | Iterable[int]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one norm's statistics and affine live in an array of one shape.

    Attributes:
      shape: the shape of x.
      view: the same elements with the axis `split` in two; else `shape`.
      shared: axes of the view over which statistics are shared.
      affine: axes of the view that scale and bias span.
      split: the axis of the view whose successor was one with it in `shape`, or None.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    shared: tuple[int, ...]
    affine: tuple[int, ...]
    split: int | None = None

    @property
    def sub_batches(self) -> bool:
        """Whether it is the batch that is split, each part with statistics of its own."""
        return self.split is not None and self.split not in self.affine

    @property
    def count(self) -> int:
        """How many elements share one mean and variance, where nothing is masked."""
        return math.prod(self.view[axis] for axis in self.shared)

    @property
    def affine_shape(self) -> tuple[int, ...]:
        """The shape of scale and bias: the sizes of their axes of x, in the order of x."""
        sizes = tuple(self.view[axis] for axis in self.affine)
        return (math.prod(sizes),) if self.split in self.affine else sizes  # groups: one axis of x

    @property
    def block(self) -> tuple[int, int, int, int] | None:
        """The view in memory as (n, s, g, k), or None if its axes don't stand in that order.

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
            place = (axis in self.shared) + 2 * (axis in self.affine)
            if place < last:
                return None
            last = place
            sizes[place] *= size
        return sizes[0], sizes[1], sizes[2], sizes[3]

    def spread(self, param: jax.Array) -> jax.Array:
        """A scale, bias or running statistic, shaped to broadcast against the view."""
        return param.reshape(
            [size if axis in self.affine else 1 for axis, size in enumerate(self.view)]
        )

    def mask(self, where: ArrayLike | None) -> jax.Array | None:
        """`where`, checked and shaped to broadcast against the view."""
        if where is None:
            return None
        where = jnp.asarray(where)
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


def make_layout(
    shape: tuple[int, ...],
    *,
    shared: Axes,
    affine: Axes,
    split: int | None = None,
    parts: int = 1,
) -> Layout:
    """The layout that shares statistics over the axes `shared` and has parameters along `affine`.

    The axis `split` is shared, but only within each of that many equal `parts`.
    """
    shared = canonical_axes(shared, len(shape))
    affine = canonical_axes(affine, len(shape))
    if split is None:
        return Layout(shape, shape, shared, affine)
    view = (*shape[:split], parts, shape[split] // parts, *shape[split + 1 :])
    moved = tuple(axis + (axis > split) for axis in affine)
    if split in affine:
        moved = tuple(sorted((*moved, split + 1)))
    return Layout(shape, view, tuple(axis + (axis >= split) for axis in shared), moved, split)


def layer_layout(shape: tuple[int, ...], axes: Axes, feature_axes: Axes | None = None) -> Layout:
    """Statistics shared over the axes, and parameters along those or along `feature_axes`."""
    if feature_axes is None:
        return make_layout(shape, shared=axes, affine=axes)
    shared = canonical_axes(axes, len(shape), "reduction_axes")
    affine = canonical_axes(feature_axes, len(shape), "feature_axes")
    return make_layout(shape, shared=shared, affine=affine)


def batch_layout(
    shape: tuple[int, ...],
    feature_axes: Axes,
    virtual_batch_size: int | None = None,
    name: str = "feature_axis",
) -> Layout:
    """Statistics of each feature, shared over all other axes; or within sub-batches of that size.

    Raises:
      ValueError: the size does not divide the batch, which is the first axis without features.
    """
    features = canonical_axes(feature_axes, len(shape), name)
    shared = other_axes(features, len(shape))
    if virtual_batch_size is None:
        return make_layout(shape, shared=shared, affine=features)
    if not shared:
        raise ValueError(
            f"x must have a batch axis that virtual_batch_size divides, got shape {shape} of "
            "features alone; put a batch axis in front of x."
        )
    batch = shape[shared[0]]
    size = check_divisor(virtual_batch_size, batch, "virtual_batch_size", "examples")
    parts = batch // size
    return make_layout(shape, shared=shared, affine=features, split=shared[0], parts=parts)


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
    return make_layout(shape, shared=other_axes(features, len(shape), start=1), affine=features)


def group_layout(
    shape: tuple[int, ...], num_groups: int, feature_axis: int = -1, shared: Axes | None = None
) -> Layout:
    """Statistics of each group of features, by default of each example by itself.

    An array of features alone is one example.

    Raises:
      ValueError: the groups do not divide the features, or the axes are not those of one example.
    """
    (axis,) = canonical_axes((feature_axis,), len(shape), "feature_axis")
    if shared is None:
        positions = instance_layout(shape, axis).shared if len(shape) > 1 else ()
        shared = (*positions, axis)
    elif axis not in canonical_axes(shared, len(shape), "reduction_axes"):
        raise ValueError(
            f"reduction_axes must hold the feature axis, {axis}, got {shared!r} for x of shape "
            f"{shape}; add it."
        )
    num_groups = check_divisor(num_groups, shape[axis], "num_groups")
    return make_layout(shape, shared=shared, affine=axis, split=axis, parts=num_groups)


def count_groups(features: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups, from that or from their size, whichever is given.

    Raises:
      ValueError: both are given or neither, or the size does not divide the features.
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"one of num_groups and group_size must be given, got num_groups={num_groups} and "
            f"group_size={group_size}; pass num_groups=None with a group_size."
        )
    if num_groups is not None:
        return check_divisor(num_groups, features, "num_groups")
    return features // check_divisor(group_size, features, "group_size")


def check_divisor(value: Any, size: int, name: str, things: str = "features") -> int:
    """A number of groups, or their size, that divides the size of an axis.

    Raises:
      TypeError: it is not an integer.
      ValueError: it does not divide the size.
    """
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {value!r}; it is compiled into the program, so in "
            "jax.jit make it a static argument."
        ) from None
    if value < 1 or size % value:
        raise ValueError(
            f"{name} must be a positive integer that divides the {things}, got {value} for "
            f"{size} {things}; choose one of their divisors."
        )
    return value


def canonical_axes(axes: Axes, ndim: int, name: str = "axis") -> tuple[int, ...]:
    """`axes` as sorted, non-negative numbers of axes of an array of `ndim` dimensions.

    Raises:
      TypeError: an axis is not an integer.
      ValueError: an axis is out of range or given twice.
    """
    given: Any = axes
    if not isinstance(axes, Iterable) or getattr(axes, "ndim", 1) == 0:
        given = (axes,)  # an array of no axes is Iterable by its type alone
    try:
        numbers = [operator.index(axis) for axis in given]
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or several, got {axes!r}; pass for example {name}=-1 (in "
            "jax.jit as a static argument)."
        ) from None
    if numbers and ndim == 0:
        raise ValueError(
            "x must have at least one axis to take statistics over, got a scalar; pass an array "
            "such as one of shape (batch, features)."
        )
    for axis in numbers:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{name} must lie in [{-ndim}, {ndim}) for an array of {ndim} dimensions, "
                f"got {axis}; choose an axis that x has."
            )
    canonical = sorted(axis % ndim for axis in numbers)
    if len(set(canonical)) < len(canonical):
        raise ValueError(
            f"{name} must name each axis once, got {axes!r} for an array of {ndim} dimensions; "
            "leave the repeated one out."
        )
    return tuple(canonical)


def other_axes(axes: tuple[int, ...], ndim: int, start: int = 0) -> tuple[int, ...]:
    """The axes from `start` on that are not in `axes`."""
    return tuple(axis for axis in range(start, ndim) if axis not in axes)


def check_input(x: Any, name: str = "x") -> jax.Array:
    """Return x as an array of a dtype that can be normalized."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating-point or complex, got dtype {x.dtype}; "
            f"convert it first, for example {name}.astype(jnp.float32)."
        )
    return x


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, full) for size, full in pairs)
