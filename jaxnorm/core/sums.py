"""Sums over axes, and broadcasts along axes, whose transposes are such sums.

A sum over the batch and other axes has two steps: the sum of each example, and the sum over the
examples. If the batch is sharded, only the second step communicates. A barrier keeps XLA from
merging the steps.

The rest depends on the platform:

- CPUs take long sums in float64, if x is in float32. In float32, rounding would depend on the
  vector length of the processor: a sum of 2**18 numbers of both signs lost 9 units on one processor
  and 3 on another. Half precision does not need this: its elements are rounded by more.
- XLA for GPUs gives each block of threads some of the sums of a column. If these are too few to
  keep a GPU busy, XLA first writes the summands to memory, in float32. So on GPUs the first step
  sums pieces. On TPUs that would be more passes over x.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._internals import explicit_sharding, is_sharded
from jaxnorm.core.exporting import platform_dependent

Axes = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
PARALLEL_SUMS = 2**15  # concurrent sums that keep a GPU busy
PIECE_LENGTH = 256  # the number of elements that a piece should have
MIN_PIECE_LENGTH = 32  # the least number
MAX_FLOAT32_TERMS = 2**12  # CPUs take longer sums in float64
# The dtype in which CPUs take long sums, by that of the summands.
WIDE_DTYPES = {jnp.dtype("float32"): "float64", jnp.dtype("complex64"): "complex128"}


def sums(arrays: Sequence[jax.Array], axes: Axes, where: jax.Array | None = None) -> Arrays:
    """Sum arrays of one shape over axes, which are kept with size one.

    The second step is one kernel for all arrays. Masked arrays are not divided into pieces.
    """
    plan = _plan(arrays[0], axes)
    whole, divided = plan._replace(pieces=1), plan.pieces > 1 and where is None
    return _by_platform(
        arrays,
        functools.partial(_in_steps, whole, jnp.sum, where),
        cpu=functools.partial(_in_steps, whole, _sum_in_float64, where),
        gpu=functools.partial(_in_steps, plan, jnp.sum, where) if divided else None,
        length=_length(arrays[0].shape, axes),
    )


def sum_axes(a: jax.Array, axes: Axes) -> jax.Array:
    """Sum over axes, which are removed, in one step."""
    add = lambda a: (jnp.sum(a, axes),)
    wide = lambda a: (_sum_in_float64(a, axes, keepdims=False),)
    return _by_platform((a,), add, cpu=wide, length=_length(a.shape, axes))[0]


def repeat(a: jax.Array, x: jax.Array, axes: Axes) -> jax.Array:
    """Repeat `a`, of size one along the axes, so that it broadcasts against x.

    The transpose is a sum over all elements; on GPUs it sums pieces as `sums` does. A sum over the
    batch has one step: XLA for GPUs divides such sums, and XLA for TPUs fuses them with
    convolutions.
    """
    plan = _plan(x, axes)
    if plan.batch or plan.pieces == 1:
        return a
    whole = lambda a: jnp.broadcast_to(a, x.shape)
    divided = functools.partial(_repeated, plan, x.shape)
    return platform_dependent(a, cuda=divided, rocm=divided, default=whole)


def expand(a: jax.Array, x: jax.Array) -> jax.Array:
    """Broadcast `a` to the shape of x; its gradient is an exact sum."""
    if a.dtype not in WIDE_DTYPES or not _is_long(x.size):
        return a
    return _expand(_Target(x.shape, explicit_sharding(x)), a)


def with_exact_sums(function: Callable, x: jax.Array, *trees: Any) -> jax.Array:
    """Call `function(exact, x, *trees)`, whose transpose sums over the axes of x.

    On CPUs, `exact(a, shape)` broadcasts, and its transpose is an exact sum. On other platforms,
    `exact` is None.
    """
    default = functools.partial(function, None)
    if x.dtype not in WIDE_DTYPES or not _is_long(x.size):
        return default(x, *trees)

    def exact(a, shape):
        if not _is_long(math.prod(shape) // math.prod(a.shape)):
            return a
        sharding = explicit_sharding(x) if shape == x.shape else None
        return _in_float64(_Target(shape, sharding).broadcast, a)

    return platform_dependent(x, *trees, cpu=functools.partial(function, exact), default=default)


class _Target(NamedTuple):
    shape: tuple[int, ...]
    sharding: Any

    def broadcast(self, a):
        return jnp.broadcast_to(a, self.shape, out_sharding=self.sharding)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _expand(target, a):
    return target.broadcast(a)


@_expand.defjvp
def _expand_jvp(target, primals, tangents):
    (a,), (ta,) = primals, tangents
    wide = functools.partial(_in_float64, target.broadcast)
    return _expand(target, a), platform_dependent(ta, cpu=wide, default=target.broadcast)


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
    least = math.ceil(min(PARALLEL_SUMS * length / a.size, length / PIECE_LENGTH))
    if least <= 1:
        return 1
    # Like a power of two: then no element has to be moved should the axis be sharded.
    divisors = [n for n in range(least, min(size, length // MIN_PIECE_LENGTH) + 1) if size % n == 0]
    return min(divisors, key=lambda n: (n.bit_count(), n % 2, n), default=1)


def _is_long(length: int) -> bool:
    """Return whether a float32 sum may round too much; a symbolic length (jax.export) may."""
    return not isinstance(length, int) or length > MAX_FLOAT32_TERMS


def _length(shape: tuple[int, ...], axes: Axes) -> int:
    return math.prod(shape[axis] for axis in axes)


def _by_platform(
    arrays: Sequence[jax.Array],
    default: Callable,
    *,
    cpu: Callable,
    length: int,
    gpu: Callable | None = None,
) -> Arrays:
    """Choose the function by platform; `cpu` is for long sums only."""
    platforms = {}
    if _is_long(length) and any(a.dtype in WIDE_DTYPES for a in arrays):
        platforms["cpu"] = cpu
    if gpu:
        platforms |= {"cuda": gpu, "rocm": gpu}
    if not platforms:
        return default(*arrays)
    return platform_dependent(*arrays, default=default, **platforms)


def _in_float64(function, a):
    """Call a function with an array in float64; round its result to the dtype of the array."""
    if a.dtype not in WIDE_DTYPES:
        return function(a)
    with jax.enable_x64(True):
        wide = lax.convert_element_type(a, WIDE_DTYPES[a.dtype])
        return lax.convert_element_type(function(wide), a.dtype)


def _sum_in_float64(a, axes, where=None, keepdims=True):
    return _in_float64(lambda a: jnp.sum(a, axes, where=where, keepdims=keepdims), a)


def _in_steps(plan, add, where, *arrays):
    """Sum pieces; sum over the pieces and the batch."""
    batch, others, pieces = plan
    done = tuple(_of_pieces(a, others, pieces, add, where) for a in arrays)
    last = batch if pieces == 1 else (*batch, others[0])
    if not last:
        return done
    done = lax.optimization_barrier(done)
    if len(done) == 1 or len({a.dtype for a in done}) > 1:
        return tuple(add(a, last, keepdims=True) for a in done)
    # Stacked, not as one `lax.reduce`, for which XLA gathers a batch that is sharded.
    return tuple(add(jnp.stack(done), tuple(axis + 1 for axis in last), keepdims=True))


def _of_pieces(a, axes, pieces, add, where):
    """Sum each piece; keep the first of the axes, with an element for each piece."""
    if pieces == 1:
        return add(a, axes, where=where, keepdims=True)
    first = axes[0]
    divided = a.reshape(*a.shape[:first], pieces, -1, *a.shape[first + 1 :])
    return add(divided, tuple(axis + 1 for axis in axes), keepdims=True).squeeze(first + 1)


def _repeated(plan, shape, a):
    """Repeat an array; the transpose is `_in_steps`."""
    first, count = plan.others[0], plan.pieces
    one = [1 if axis in plan.others else size for axis, size in enumerate(shape)]
    pieces = jnp.broadcast_to(a, (*shape[:first], count, *one[first + 1 :]))
    pieces = jnp.expand_dims(lax.optimization_barrier(pieces), first + 1)
    divided = (*shape[:first], count, shape[first] // count, *shape[first + 1 :])
    return jnp.broadcast_to(pieces, divided).reshape(shape)
