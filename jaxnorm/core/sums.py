"""Sums over axes, in steps of which XLA makes few kernels that each read memory once.

A sum over the batch and other axes is taken of each example first, and then of all. The batch may
be sharded, and then only the second step communicates. There is a barrier between them, or XLA
would join them.

XLA for GPUs gives each block of threads some of the sums of a column. Where these are too few to
keep a GPU busy, it writes what it sums to memory first, in float32. So there the first step takes
the sums of pieces. On TPUs that would be more passes over x, and on CPUs it is slower.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._internals import is_sharded

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
ENOUGH = 2**15  # sums at a time keep a GPU busy
LONG = 256  # elements that a piece should have
SHORT = 32  # elements that it must have


def sums(arrays: Sequence[jax.Array], axes: Axes, where: jax.Array | None = None) -> Arrays:
    """Sums of arrays of one shape, over axes that are kept with size one.

    The second step is one kernel for all arrays. Masked arrays are not divided into pieces.
    """
    plan = _plan(arrays[0], axes)
    whole = functools.partial(_in_steps, plan._replace(pieces=1), where)
    if plan.pieces == 1 or where is not None:
        return whole(*arrays)
    divided = functools.partial(_in_steps, plan, None)
    return lax.platform_dependent(*arrays, cuda=divided, rocm=divided, default=whole)


def repeat(a: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """`a`, of size one along the axes, so that it broadcasts against x.

    Its transpose is a sum of all elements, in pieces where `sums` takes them. Over the batch it is
    of one step: XLA for GPUs divides such sums by itself, and XLA for TPUs fuses them with
    convolutions.
    """
    plan = _plan(x, axes)
    if plan.batch or plan.pieces == 1:
        return a
    whole = lambda a: jnp.broadcast_to(a, x.shape)
    divided = functools.partial(_repeated, plan, x.shape)
    return lax.platform_dependent(a, cuda=divided, rocm=divided, default=whole)


class _Plan(NamedTuple):
    """The axes of a sum: the batch, if it is summed last, and the others.

    On GPUs the first of the others is divided into `pieces`.
    """

    batch: Axes
    others: Axes
    pieces: int


def _plan(a: jax.Array, axes: Axes) -> _Plan:
    batch = axes[:1] if axes[:1] == (0,) and len(axes) > 1 else ()
    others = axes[len(batch) :]
    return _Plan(batch, others, _pieces(a, others))


def _pieces(a: jax.Array, axes: Axes) -> int:
    static = all(isinstance(size, int) for size in a.shape)
    if not axes or axes[0] == 0 or a.ndim - 1 in axes or not static or not a.size:
        return 1  # nothing to sum, or the batch alone, or rows
    if any(is_sharded(a, axis) for axis in axes):
        return 1
    size, length = a.shape[axes[0]], math.prod(a.shape[axis] for axis in axes)
    least = math.ceil(min(ENOUGH * length / a.size, length / LONG))
    if least <= 1:
        return 1
    # Like a power of two: then no element has to be moved should the axis be sharded.
    divisors = [n for n in range(least, min(size, length // SHORT) + 1) if size % n == 0]
    return min(divisors, key=lambda n: (n.bit_count(), n % 2, n), default=1)


def _in_steps(plan, where, *arrays):
    """Sums of pieces, and then of all pieces and of the batch."""
    batch, others, pieces = plan
    done = tuple(_of_pieces(a, others, pieces, where) for a in arrays)
    last = batch if pieces == 1 else (*batch, others[0])
    if not last:
        return done
    done = lax.optimization_barrier(done)
    if len(done) == 1 or len({a.dtype for a in done}) > 1:
        return tuple(jnp.sum(a, last, keepdims=True) for a in done)
    # Stacked, not as one `lax.reduce`, for which XLA gathers a batch that is sharded.
    return tuple(jnp.sum(jnp.stack(done), [axis + 1 for axis in last], keepdims=True))


def _of_pieces(a, axes, pieces, where):
    """The first of the axes is kept, with an element for each piece."""
    if pieces == 1:
        return jnp.sum(a, axes, where=where, keepdims=True)
    first = axes[0]
    divided = a.reshape(*a.shape[:first], pieces, -1, *a.shape[first + 1 :])
    return jnp.sum(divided, [axis + 1 for axis in axes], keepdims=True).squeeze(first + 1)


def _repeated(plan, shape, a):
    """The transpose of `_in_steps` for one array."""
    first, count = plan.others[0], plan.pieces
    one = [1 if axis in plan.others else size for axis, size in enumerate(shape)]
    pieces = jnp.broadcast_to(a, (*shape[:first], count, *one[first + 1 :]))
    pieces = jnp.expand_dims(lax.optimization_barrier(pieces), first + 1)
    divided = (*shape[:first], count, shape[first] // count, *shape[first + 1 :])
    return jnp.broadcast_to(pieces, divided).reshape(shape)
