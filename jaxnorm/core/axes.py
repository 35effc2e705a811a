"""Integers that a caller gives, such as axes and groups: checked, and made canonical."""

import operator
from collections.abc import Iterable
from typing import Any

Axes = int | Iterable[int]


def check_integer(value: Any, name: str) -> int:
    """Return a Python integer.

    Raises:
      TypeError: it is not an integer, or is traced.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, got {value!r}; it is compiled into the program, so in "
            "jax.jit make it a static argument."
        ) from None


def count_groups(features: int, num_groups: int | None, group_size: int | None) -> int:
    """Return the number of groups, from that number or from their size.

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
    """Return a number of groups, or their size, that divides the size of an axis.

    Raises:
      TypeError: it is not an integer.
      ValueError: it does not divide the size.
    """
    value = check_integer(value, name)
    if value < 1 or size % value:
        raise ValueError(
            f"{name} must be a positive integer that divides the {things}, got {value} for "
            f"{size} {things}; choose one of their divisors."
        )
    return value


def canonical_axes(axes: Axes, ndim: int, name: str = "axis") -> tuple[int, ...]:
    """Return `axes` as sorted, non-negative numbers of axes of an array of `ndim` dimensions.

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
    """Return the axes from `start` on that are not in `axes`."""
    return tuple(axis for axis in range(start, ndim) if axis not in axes)
