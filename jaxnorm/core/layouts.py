"""The layout of each norm. The axes that a caller gives are checked once for each shape."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

from jaxnorm.core.axes import Axes, canonical_axes, check_divisor, other_axes
from jaxnorm.core.layout import Layout

F = TypeVar("F", bound=Callable)


def cached(function: F) -> F:
    """Cache the results of a function of static arguments.

    Results for lists and for the symbolic sizes of jax.export, which can't be hashed, are not
    cached.
    """
    results = functools.lru_cache(maxsize=4096, typed=True)(function)

    @functools.wraps(function)
    def call(shape, *args, **kwargs):
        if all(type(size) is int for size in shape):
            try:
                return results(shape, *args, **kwargs)
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
    arguments: tuple[str, ...] = (),
) -> Layout:
    """Make a layout for x of that shape.

    If `split` is given, that axis is divided into equal `parts`, and statistics are shared only
    within each part. `arguments` are the caller's names for the axes of the features.
    """
    reduction_axes = canonical_axes(reduction_axes, len(shape))
    feature_axes = canonical_axes(feature_axes, len(shape))
    return Layout(shape, reduction_axes, feature_axes, split, parts, arguments)


@cached
def moments_layout(shape: tuple[int, ...], axis: Axes) -> Layout:
    """Statistics over the given axes, and no parameters."""
    return make_layout(shape, reduction_axes=axis, feature_axes=())


@cached
def layer_layout(shape: tuple[int, ...], axes: Axes, feature_axes: Axes | None = None) -> Layout:
    """Statistics over the axes, and parameters along those or along `feature_axes`."""
    if feature_axes is None:
        return make_layout(shape, reduction_axes=axes, feature_axes=axes, arguments=("axis",))
    arguments = "reduction_axes", "feature_axes"
    reduced, features = (
        canonical_axes(given, len(shape), name)
        for given, name in zip((axes, feature_axes), arguments, strict=True)
    )
    return make_layout(shape, reduction_axes=reduced, feature_axes=features, arguments=arguments)


@cached
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
        return make_layout(shape, reduction_axes=others, feature_axes=features, arguments=(name,))
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
        arguments=(name,),
    )


@cached
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
    return make_layout(shape, reduction_axes=positions, feature_axes=features, arguments=(name,))


@cached
def group_layout(
    shape: tuple[int, ...],
    num_groups: int,
    feature_axis: int = -1,
    reduction_axes: Axes | None = None,
    arguments: tuple[str, ...] = (),
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
        shape,
        reduction_axes=reduction_axes,
        feature_axes=axis,
        split=axis,
        parts=num_groups,
        arguments=arguments,
    )
