"""Sums over axes, and what repeats an array along axes, whose transpose is such a sum.

A sum over the batch and other axes is taken of each example first, and then of all. The batch may
be sharded, and then only the second step communicates. There is a barrier between them, or XLA
would join them.

What else the steps are depends on the platform:

- CPUs add in float64. In float32 the rounding would depend on how many elements each vector of the
  processor holds: a sum of 2**18 numbers of both signs lost 9 units on one and 3 on another.
- XLA for GPUs gives each block of threads some of the sums of a column. Where these are too few to
  keep a GPU busy, it writes what it sums to memory first, in float32. So there the first step takes
  the sums of pieces. On TPUs that would be more passes over x.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._internals import explicit_spec, is_sharded
from jaxnorm.core.exporting import platform_dependent

Axes = tuple[int, ...]
Shape = tuple[int, ...]
Arrays = tuple[jax.Array, ...]
ENOUGH = 2**15  # sums at a time keep a GPU busy
LONG = 256  # elements that a piece should have
SHORT = 32  # elements that it must have
FEW = 16  # numbers of one sign, whose sum float32 can't make worse than by 4 units on average
WIDE = {jnp.dtype("float32"): "float64", jnp.dtype("complex64"): "complex128"}


def sums(arrays: Sequence[jax.Array], axes: Axes, where: jax.Array | None = None) -> Arrays:
    """Sums of arrays of one shape, over axes that are kept with size one.

    The second step is one kernel for all arrays. Masked arrays are not divided into pieces.
    """
    plan = _plan(arrays[0], axes)
    whole = plan._replace(pieces=1)
    pieces = plan if where is None else whole
    return _by_platform(
        arrays,
        functools.partial(_in_steps, whole, jnp.sum, where),
        cpu=functools.partial(_in_steps, whole, _sum_in_float64, where),
        gpu=functools.partial(_in_steps, pieces, jnp.sum, where) if pieces.pieces > 1 else None,
        length=_length(arrays[0].shape, axes),
    )


def total(a: jax.Array, axes: Axes) -> jax.Array:
    """The sum over axes, which are removed, in one step."""
    add = lambda a: (jnp.sum(a, axes),)
    wide = lambda a: (_sum_in_float64(a, axes, keepdims=False),)
    return _by_platform((a,), add, cpu=wide, length=_length(a.shape, axes))[0]


def repeat(a: jax.Array, shape: Shape, x: jax.Array | None = None) -> jax.Array:
    """`a` repeated along axes on which its size is one; linear in `a`.

    Its transpose is a sum of all elements: in float64 on CPUs, and on GPUs in pieces where `sums`
    takes them. Over the batch that is one step: XLA for GPUs divides such sums by itself, and XLA
    for TPUs fuses them with convolutions. The result is sharded like x.
    """
    if a.shape == shape:
        return a
    divided = None
    if x is not None and x.shape == shape:
        plan = _plan(x, _repeated_axes(a.shape, shape))
        if plan.pieces > 1 and not plan.batch:
            divided = lambda a: (_repeated(plan, shape, a),)
    return _repeat(_target(shape, x), a, divided)


def expand(a: jax.Array, shape: Shape, x: jax.Array | None = None) -> jax.Array:
    """The same for `a` in which nothing has to be linear: only the derivative is `repeat`."""
    return a if a.shape == shape else _expand(_target(shape, x), a)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _expand(target, a):
    return _broadcast(target, a)


@_expand.defjvp
def _expand_jvp(target, primals, tangents):
    (a,), (ta,) = primals, tangents
    return _expand(target, a), _repeat(target, ta)


def _repeat(target, a, gpu=None):
    whole = lambda a: (_broadcast(target, a),)
    wide = lambda a: (_in_float64(functools.partial(_broadcast, target), a),)
    length = _length(target.shape, _repeated_axes(a.shape, target.shape))
    return _by_platform((a,), whole, cpu=wide, gpu=gpu, length=length)[0]


def _repeated_axes(shape, to):
    return tuple(axis for axis, size in enumerate(shape) if size == 1 and to[axis] != 1)


def in_float64_on_cpus(function: Callable, spec: Any, *trees: Any) -> jax.Array:
    """`function(spec, *trees)`, on CPUs in float64 where the spec's arithmetic is in float32."""
    dtype = spec.compute_dtype
    if dtype not in WIDE:
        return function(spec, *trees)

    def wide(*trees):
        with jax.enable_x64(True):
            result = function(spec._replace(compute_dtype=jnp.dtype(WIDE[dtype])), *trees)
            return lax.convert_element_type(result, dtype)

    default = functools.partial(function, spec)
    return platform_dependent(*trees, cpu=wide, default=default)


class _Target(NamedTuple):
    shape: Shape
    sharding: jax.P | None


def _target(shape, x):
    """The shape, and the sharding of x on the axes that it has of x."""
    spec = None if x is None else explicit_spec(x)
    if x is None or spec is None:
        return _Target(shape, None)
    sizes = zip(spec, shape, x.shape, strict=True)
    return _Target(shape, jax.P(*(axes if size == full else None for axes, size, full in sizes)))


def _broadcast(target, a):
    return jnp.broadcast_to(a, target.shape, out_sharding=target.sharding)


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


def _length(shape: Shape, axes: Axes) -> int:
    return math.prod(shape[axis] for axis in axes)


def _by_platform(
    arrays: Sequence[jax.Array],
    default: Callable,
    *,
    cpu: Callable,
    length: int,
    gpu: Callable | None = None,
) -> Arrays:
    """The function of each platform, of arrays; the CPU's where sums have this many elements."""
    platforms = {}
    # A symbolic length, of jax.export, may be any.
    short = isinstance(length, int) and length <= FEW
    if not short and any(a.dtype in WIDE for a in arrays):
        platforms["cpu"] = cpu
    if gpu:
        platforms |= {"cuda": gpu, "rocm": gpu}
    if not platforms:
        return default(*arrays)
    return platform_dependent(*arrays, default=default, **platforms)


def _in_float64(function, a):
    """The function of an array in float64, rounded to the dtype of the array."""
    if a.dtype not in WIDE:
        return function(a)
    with jax.enable_x64(True):
        wide = lax.convert_element_type(a, WIDE[a.dtype])
        return lax.convert_element_type(function(wide), a.dtype)


def _sum_in_float64(a, axes, where=None, keepdims=True):
    return _in_float64(lambda a: jnp.sum(a, axes, where=where, keepdims=keepdims), a)


def _in_steps(plan, add, where, *arrays):
    """Sums of pieces, and then of all pieces and of the batch."""
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
    """The first of the axes is kept, with an element for each piece."""
    if pieces == 1:
        return add(a, axes, where=where, keepdims=True)
    first = axes[0]
    divided = a.reshape(*a.shape[:first], pieces, -1, *a.shape[first + 1 :])
    return add(divided, tuple(axis + 1 for axis in axes), keepdims=True).squeeze(first + 1)


def _repeated(plan, shape, a):
    """The transpose of `_in_steps` for one array."""
    first, count = plan.others[0], plan.pieces
    one = [1 if axis in plan.others else size for axis, size in enumerate(shape)]
    pieces = jnp.broadcast_to(a, (*shape[:first], count, *one[first + 1 :]))
    pieces = jnp.expand_dims(lax.optimization_barrier(pieces), first + 1)
    divided = (*shape[:first], count, shape[first] // count, *shape[first + 1 :])
    return jnp.broadcast_to(pieces, divided).reshape(shape)
