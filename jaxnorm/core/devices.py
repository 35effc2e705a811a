"""Named axes: the devices, or the mapped examples, that share statistics.

Each of them has measured a part. The parts are gathered into one small table, in one collective,
and every device merges the table by itself, so that all come to the same numbers. The table grows
with the number of devices; where it would take longer than a second collective, the parts are
merged through sums instead, two of them, that cost the same for any number.

In `shard_map` and `pmap` the groups of `axis_index_groups` gather among themselves. `vmap` knows no
groups, and groups of different sizes can't be gathered: there the table holds the parts of all.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AxisName = Any  # any hashable name, or a tuple of names
AxisGroups = Sequence[Sequence[int]] | None
Equation = Callable[[Callable, Any], Any]

# Bytes that take about as long to arrive, 20 to 40 microseconds at 25 to 50 GB/s, as one more
# collective takes to start.
LARGEST_TABLE = 2**20


class Devices(NamedTuple):
    """The devices along a named axis, and which of them share statistics; no name: this one alone.

    Attributes:
      name: the axis name or a tuple of them.
      groups: the indices along the axis, each in one group; None is one group of all.
    """

    name: AxisName = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def sum(self, tree: Any) -> Any:
        """The sums of arrays of one shape over the devices that share, in one collective."""
        if self.name is None:
            return tree
        if self.groups is None:
            size = lax.axis_size(self.name)
            return _packed(lambda a: lax.psum(a, self.name), lambda a: size * a, tree)
        return over_rows(lambda add, rows: add(rows), self._gather(tree))

    def merge(self, equation: Equation, parts: Any) -> Any:
        """`equation(add, parts)`, where `add` sums over the devices that share.

        In one collective, however often the equation adds, unless the table is large. The parts
        are arrays of one shape, or of NumPy: those are the same on all devices and are not sent.
        The result is not to be differentiated.
        """
        if self.name is None:
            return parts
        if self.groups is None and not self._is_small(parts):
            return equation(self.sum, parts)
        return over_rows(equation, self._gather(parts))

    def _is_small(self, parts: Any) -> bool:
        sent = [a for a in jax.tree.leaves(parts) if not isinstance(a, np.ndarray)]
        size = sum(math.prod(a.shape) * a.dtype.itemsize for a in sent)
        # The symbolic shapes of jax.export have sizes that are no int.
        return isinstance(size, int) and size * lax.axis_size(self.name) <= LARGEST_TABLE

    def _gather(self, parts: Any) -> Any:
        """The parts of all that share, along a new first axis; those of others are zeros there."""
        names = self.name if isinstance(self.name, tuple) else (self.name,)
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)  # of shard_map and pmap
        size, groups, among = lax.axis_size(names), self.groups, None
        if groups and manual.issuperset(names) and len(set(map(len, groups))) == 1:
            size, groups, among = len(groups[0]), None, groups

        def gather(a):
            # vmap gathers one name at a time, the first name's index being the slowest.
            steps = [names] if manual.issuperset(names) else [(name,) for name in reversed(names)]
            rows = a
            for step in steps:
                # Without groups all devices hold the same rows; this says so to check_vma=True.
                same = self.groups is None and manual.issuperset(step)
                to = "invarying" if same else "varying"
                rows = lax.all_gather(rows, step, axis=1, axis_index_groups=among, to=to)
            return rows.reshape(a.shape[0], size, *a.shape[1:])

        rows = _packed(gather, lambda a: np.broadcast_to(a, (size, *a.shape)), parts)
        if groups is None:
            return rows
        share = np.zeros((size, size), bool)
        for group in groups:
            share[np.ix_(group, group)] = True
        mine = jnp.asarray(share)[lax.axis_index(names)]
        return jax.tree.map(lambda a: jnp.where(mine.reshape(-1, *[1] * (a.ndim - 1)), a, 0), rows)


HERE = Devices()  # no other device


def bound_devices(axis_name: AxisName, axis_index_groups: AxisGroups = None) -> Devices:
    """The `Devices` of an axis name that something around this call binds.

    Raises:
      ValueError: nothing binds the name, or the groups do not hold each index of it once.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                "axis_index_groups must come with the axis_name that it divides, got no axis_name;"
                " pass both or neither."
            )
        return HERE
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"axis_name must be bound by jax.shard_map, jax.pmap or jax.vmap around this call, got "
            f"{axis_name!r}, which nothing binds; map over that name, or pass axis_name=None: under"
            " plain jax.jit statistics are those of the whole array however it is sharded."
        ) from None
    if axis_index_groups is None:
        return Devices(axis_name)
    groups = [list(row) if isinstance(row, Iterable) else [row] for row in axis_index_groups]
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index from 0 to {size - 1} of axis {axis_name!r} "
            f"once, got {axis_index_groups!r}; list every index in exactly one group."
        )
    return Devices(axis_name, tuple(tuple(map(int, group)) for group in groups if group))


def over_rows(equation: Equation, rows: Any) -> Any:
    """`equation(add, rows)`, where `add` sums over the first axis, which the result lacks."""
    add = functools.partial(jax.tree.map, lambda a: jnp.sum(a, 0, keepdims=True))
    return jax.tree.map(lambda a: a[0], equation(add, rows))


def _packed(collective: Callable, constant: Callable, tree: Any) -> Any:
    """One collective of all arrays, which have one shape; `constant` of those of NumPy.

    The collective is given them along a new first axis, which it keeps.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [part for a in leaves if not isinstance(a, np.ndarray) for part in _real_parts(a)]
    done = iter(collective(jnp.stack(parts)))

    def result(a):
        if isinstance(a, np.ndarray):
            return constant(a)
        return lax.complex(next(done), next(done)) if jnp.iscomplexobj(a) else next(done)

    return structure.unflatten(map(result, leaves))


def _real_parts(a: jax.Array) -> tuple[jax.Array, ...]:
    return (jnp.real(a), jnp.imag(a)) if jnp.iscomplexobj(a) else (a,)
