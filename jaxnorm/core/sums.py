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

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
ENOUGH = 2**15  # sums at a time keep a GPU busy
LONG = 256  # elements; pieces of fewer are too many numbers


def sums(arrays: Sequence[jax.Array], axes: Axes, where: jax.Array | None = None) -> Arrays:
    """Sums of arrays of one shape, over axes that are kept with size one.

    The second step is one kernel for all arrays. Masked arrays are not divided.
    """
    steps = _steps(arrays[0], axes)
    whole = functools.partial(_in_steps, steps._replace(pieces=1), where)
    if where is not None:
        return whole(*arrays)
    return _on_gpus(steps, functools.partial(_in_steps, steps, None), whole, *arrays)


def repeat(a: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """`a`, of size one along the axes, so that it broadcasts against x.

    Its transpose is a sum, in pieces where `sums` takes them. Over the batch it is of one step: XLA
    for GPUs divides such sums by itself, and XLA for TPUs fuses them with convolutions.
    """
    steps = _steps(x, axes)
    if steps.batch or steps.pieces == 1:
        return a
    whole = lambda a: jnp.broadcast_to(a, x.shape)
    return _on_gpus(steps, functools.partial(_repeated, steps, x.shape), whole, a)


class _Steps(NamedTuple):
    """The axes of a sum: the batch, if it is summed last, and the others.

    On GPUs the first of the others is divided into `pieces`.
    """

    batch: Axes
    others: Axes
    pieces: int


def _steps(a: jax.Array, axes: Axes) -> _Steps:
    batch = axes[:1] if axes[:1] == (0,) and len(axes) > 1 else ()
    others = axes[len(batch) :]
    return _Steps(batch, others, _pieces(a, others))


def _pieces(a: jax.Array, axes: Axes) -> int:
    static = all(isinstance(size, int) for size in a.shape)
    if not axes or axes[0] == 0 or a.ndim - 1 in axes or not static or not a.size:
        return 1  # nothing to sum, or the batch alone, or rows
    if jax.typeof(a).sharding.spec[axes[0]]:
        return 1
    size, length = a.shape[axes[0]], math.prod(a.shape[axis] for axis in axes)
    least = max(1, math.ceil(min(ENOUGH * length / a.size, length / LONG)))
    divisors = (n for n in range(least, min(size, 8 * least) + 1) if size % n == 0)
    return next(divisors, 1)


def _on_gpus(steps, divided, whole, *args):
    if steps.pieces == 1:
        return whole(*args)
    return lax.platform_dependent(*args, cuda=divided, rocm=divided, default=whole)


def _in_steps(steps, where, *arrays):
    """Sums of pieces, and then of all pieces and of the batch."""
    batch, others, pieces = steps
    done = tuple(_of_pieces(a, others, pieces, where) for a in arrays)
    last = (*batch, *others[: pieces > 1])
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


def _repeated(steps, shape, a):
    """The transpose of `_in_steps` for one array."""
    first, count = steps.others[0], steps.pieces
    one = [1 if axis in steps.others else size for axis, size in enumerate(shape)]
    pieces = jnp.broadcast_to(a, (*shape[:first], count, *one[first + 1 :]))
    pieces = jnp.expand_dims(lax.optimization_barrier(pieces), first + 1)
    divided = (*shape[:first], count, shape[first] // count, *shape[first + 1 :])
    return jnp.broadcast_to(pieces, divided).reshape(shape)
