"""Named axes: the devices, or the mapped examples, that share statistics.

Each of them has measured a part. In `shard_map` and `pmap` the parts are gathered into one small
table, in one collective, and every device merges the table by itself, so that all come to the same
numbers. The table grows with the number of devices; where it would take longer than a second
collective, the parts are merged through sums instead, two of them, that cost the same for any
number. So they are under `vmap`, where nothing is sent.

Groups of devices gather among themselves if they are of one size. Others, and those of `vmap`,
which knows no groups, are summed in a table with a row for each group.
"""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
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
    """The devices along named axes, and which of them share statistics; no name: this one alone.

    Attributes:
      names: of the axes.
      size: how many devices there are along them.
      groups: the indices along the axes, each in one group; None is one group of all.
      manual: whether the names are those of `shard_map` or `pmap`.
    """

    names: tuple = ()
    size: int = 1
    groups: tuple[tuple[int, ...], ...] | None = None
    manual: bool = False

    @property
    def mapped(self) -> bool:
        """Whether `vmap` binds a name.

        JAX gets to the derivative of what is compiled inside of it when it has left the name, so
        there nothing may be compiled by itself, and no name be asked for in a derivative.
        """
        return bool(self.names) and not self.manual

    @property
    def gather(self) -> bool:
        """Whether JAX can gather among those that share."""
        return self.manual and len({len(group) for group in self.groups or ((),)}) == 1

    def group(self) -> jax.Array | None:
        """The group of this device, where there are groups that can't gather."""
        if not self.groups or self.gather:
            return None
        group_of = {index: number for number, group in enumerate(self.groups) for index in group}
        table = jnp.array([group_of[index] for index in range(self.size)])
        return table[lax.axis_index(self.names)]

    def sum(self, tree: Any, group: jax.Array | None = None) -> Any:
        """The sums of arrays of one shape over the devices that share, in one collective."""
        if not self.names:
            return tree
        if not self.groups:
            return _packed(self._psum, lambda a: self.size * a, tree)
        if self.gather:
            return over_rows(lambda add, rows: add(rows), self._gathered(tree))
        sizes = [len(members) for members in self.groups]

        def sums(a):
            mine = (jnp.arange(len(sizes)) == group).reshape(-1, *[1] * a.ndim)
            return self._psum(jnp.where(mine, a[None], 0))[group]

        return _packed(sums, lambda a: jnp.array(sizes, a.dtype)[group] * a, tree)

    def merge(self, equation: Equation, parts: Any, group: jax.Array | None = None) -> Any:
        """`equation(add, parts)`, where `add` sums over the devices that share.

        In one collective, however often the equation adds, where a small table can be gathered.
        The parts are arrays of one shape, or of NumPy: those are the same on all devices and are
        not sent. The result is not to be differentiated.
        """
        if not self.names:
            return parts
        if self.gather and (self.groups or self._is_small(parts)):
            return over_rows(equation, self._gathered(parts))
        return equation(functools.partial(self.sum, group=group), parts)

    def _is_small(self, parts: Any) -> bool:
        sent = [a for a in jax.tree.leaves(parts) if not isinstance(a, np.ndarray)]
        size = sum(math.prod(a.shape) * a.dtype.itemsize for a in sent)
        # The symbolic shapes of jax.export have sizes that are no int.
        return isinstance(size, int) and size * self.size <= LARGEST_TABLE

    def _gathered(self, parts: Any) -> Any:
        """The parts of all that share, along a new first axis."""
        size = len(self.groups[0]) if self.groups else self.size
        gather = functools.partial(
            lax.all_gather,
            axis_name=self.names,
            axis=1,
            axis_index_groups=self.groups,
            # Without groups all devices hold the same rows; this says so to check_vma=True.
            to="varying" if self.groups else "invarying",
        )
        return _packed(gather, lambda a: np.broadcast_to(a, (size, *a.shape)), parts)

    def _psum(self, a: jax.Array) -> jax.Array:
        try:
            return lax.psum(a, self.names)
        except ValueError:
            if not self.manual:
                raise
            # With check_vma=True, a may be the same along some of the names: one at a time.
            return functools.reduce(lax.psum, self.names, a)


HERE = Devices()  # no other device


def bound_devices(axis_name: AxisName, axis_index_groups: AxisGroups = None) -> Devices:
    """The `Devices` of an axis name that something around this call binds.

    Raises:
      TypeError: the name is no name, or the groups are not of integers.
      ValueError: nothing binds the name, it is given twice, or the groups do not hold each index
        of it once.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                "axis_index_groups must come with the axis_name that it divides, got no axis_name;"
                " pass both or neither."
            )
        return HERE
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    for name in names:
        if isinstance(name, int | jax.Array) or not isinstance(name, Hashable):
            raise TypeError(
                f"axis_name must be a name or a tuple of names, got a {type(name).__name__}; pass"
                ' for example axis_name="data", and what else comes after state by its keyword.'
            )
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                "axis_name must be bound by jax.shard_map, jax.pmap or jax.vmap around this call, "
                f"got {name!r}, which nothing binds; map over that name, or pass axis_name=None: "
                "under plain jax.jit statistics are those of the whole array however it is sharded."
            ) from None
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name must hold each name once, got {names!r}; leave one out.")
    size = lax.axis_size(names)
    manual = set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
    if axis_index_groups is None:
        return Devices(names, size, None, manual)
    try:
        groups = [[operator.index(index) for index in group] for group in axis_index_groups]
    except TypeError:
        raise TypeError(
            f"axis_index_groups must be lists of integers, got {axis_index_groups!r}; pass for "
            "example [[0, 1], [2, 3]] (in jax.jit as a static argument)."
        ) from None
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index from 0 to {size - 1} of axis {axis_name!r} "
            f"once, got {axis_index_groups!r}; list every index in exactly one group."
        )
    return Devices(names, size, tuple(tuple(group) for group in groups if group), manual)


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
