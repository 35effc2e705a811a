"""Sums over axes, in steps of which XLA makes few kernels that each read memory once.

XLA for GPUs gives each block of threads some of the sums of a column. Where there are too few to
keep a GPU busy, or their length suits no kernel, it writes what it sums to memory first, in
float32. So a sum is taken in two steps, with a barrier between them, or XLA would join them: of
pieces of the axes, and of all pieces.

The batch belongs to the second step. It may be sharded, and then only that step communicates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[int, ...]
ENOUGH = 2**15  # sums at a time keep a GPU busy
LONG = 256  # elements; pieces of fewer are too many numbers


def sums(
    arrays: Sequence[jax.Array], axes: Axes, where: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Sums of arrays of one shape, over axes that are kept with size one.

    The second step is one kernel for all arrays.
    """
    first, second, pieces = _steps(arrays[0], axes, where is None)

    def of_pieces(a):
        if pieces == 1:
            return jnp.sum(a, first, where=where, keepdims=True)
        axis = first[0]
        divided = a.reshape(*a.shape[:axis], pieces, -1, *a.shape[axis + 1 :])
        return jnp.sum(divided, [axis + 1 for axis in first], keepdims=True).squeeze(axis + 1)

    done = tuple(map(of_pieces, arrays))
    if not second:
        return done
    done = lax.optimization_barrier(done)
    if len(done) == 1 or len({a.dtype for a in done}) > 1:
        return tuple(jnp.sum(a, second, keepdims=True) for a in done)
    # Stacked, not as one `lax.reduce`, for which XLA gathers a batch that is sharded.
    return tuple(jnp.sum(jnp.stack(done), [axis + 1 for axis in second], keepdims=True))


def repeat(a: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """`a`, of size one along the axes, so that it broadcasts against x.

    Its transpose is a sum of the same two steps. Over the batch it is of one: XLA for GPUs divides
    such sums by itself, and XLA for TPUs fuses them with convolutions.
    """
    first, second, pieces = _steps(x, axes)
    if pieces == 1 or 0 in second:
        return a
    axis = first[0]
    shape = [1 if each in first else size for each, size in enumerate(x.shape)]
    shape[axis] = pieces
    a = lax.optimization_barrier(jnp.broadcast_to(a, shape))
    divided = (*x.shape[:axis], pieces, x.shape[axis] // pieces, *x.shape[axis + 1 :])
    return jnp.broadcast_to(jnp.expand_dims(a, axis + 1), divided).reshape(x.shape)


class _Steps(NamedTuple):
    """The axes of both steps, and into how many pieces the first axis of the first is divided."""

    first: Axes
    second: Axes
    pieces: int


def _steps(a: jax.Array, axes: Axes, divides: bool = True) -> _Steps:
    batch = axes[:1] if axes[:1] == (0,) and len(axes) > 1 else ()
    first = axes[len(batch) :]
    pieces = _pieces(a, first) if divides else 1
    return _Steps(first, batch + first[:1] if pieces > 1 else batch, pieces)


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
