"""Named axes: the devices, or the mapped examples, that share statistics.

They exchange by `psum`, which `shard_map`, `pmap` and `vmap` all bind, batch, transpose and give an
unvarying type, at a cost that does not grow with their number. Groups of devices are served by a
table with a row for each group, because `psum`'s own `axis_index_groups` is refused under `vmap`
and under `shard_map(check_vma=True)`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

AxisName = Any  # any hashable name, or a tuple of names
AxisGroups = Sequence[Sequence[int]] | None


class Devices(NamedTuple):
    """The devices along a named axis, and which of them share statistics; no name: this one alone.

    Attributes:
      name: the axis name or a tuple of them.
      groups: for each index along the axis, the number of its group; None is one group of all.
    """

    name: AxisName = None
    groups: tuple[int, ...] | None = None

    def sum(self, tree: Any) -> Any:
        """The sums of arrays over the devices that share; its transpose is the same sums."""
        if self.name is None:
            return tree
        if self.groups is None:
            return lax.psum(tree, self.name)
        group, size = jnp.asarray(self.groups)[lax.axis_index(self.name)], max(self.groups) + 1
        table = lax.psum(jax.tree.map(lambda a: _row(a, group, size), tree), self.name)
        return jax.tree.map(lambda rows: rows[group], table)


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
    rows = [list(row) if isinstance(row, Iterable) else [row] for row in axis_index_groups]
    if sorted(index for row in rows for index in row) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index from 0 to {size - 1} of axis {axis_name!r} "
            f"once, got {axis_index_groups!r}; list every index in exactly one group."
        )
    group_of = {index: number for number, row in enumerate(rows) for index in row}
    return Devices(axis_name, tuple(group_of[index] for index in range(size)))


def _row(a: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """A table of `size` rows, all zero but row `index`, which is `a`."""
    mine = jnp.arange(size, dtype=index.dtype) == index
    return jnp.where(mine.reshape((size,) + (1,) * a.ndim), a[None], 0)
