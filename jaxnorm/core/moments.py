"""Mean and variance: measured, merged, across devices and over time.

One float32 cannot hold the mean of data such as 1e4 + noise to the precision that x - mean asks
for. So the elements are centred twice: with m the rounded mean, d = x - m is nearly exact, and its
own small mean c is what rounding m left out. Wherever a mean goes on being used, it goes as the
pair (mean, rest) = (m, c).

Measuring is differentiated by hand. With e = x - mean, r = (var + epsilon)**-1/2, h = e r, and avg
the average over the elements that count (and the devices), the tangents are

    t_mean = avg(tx),    t_var = 2 avg(tx e) = 2 q / r,    t_r = -r**3 / 2 t_var = -r**2 q

with q = avg(tx h), for complex x avg(Re(tx conj(h))). Written with h, nothing under- or overflows
where r**3 or e**2 would. JAX transposes this into the backward pass; together with y = e r
(standardize.py) it is the closed form, with the statistics' own terms in it:

    ty = r (tx - avg(tx) - h avg(tx h)),    dx = r (dy - w / n (sum(dy) + h sum(dy h)))

where w is one for the elements that count and n is how many they are. Every position feels dy;
only those that were measured feel the statistics.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxnorm.core.devices import HERE, Devices, over_rows
from jaxnorm.core.layout import Layout

Count = jax.Array | np.ndarray  # NumPy's is the same everywhere


class Moments(NamedTuple):
    """Mean, biased variance, and the number of elements that they were taken over.

    Attributes:
      mean: the mean, complex for complex elements.
      var: the mean squared distance from the mean, real.
      count: how many elements counted (after `where`), in the dtype of `var`.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)


class Statistics(NamedTuple):
    """What standardizing takes; shared axes are kept with size one.

    `mean + rest` is the mean to twice the precision. Norms that do not centre have neither, and
    their `var` is the mean square.
    """

    mean: jax.Array | None
    rest: jax.Array | None
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    rstd: jax.Array

    def moments(self, layout: Layout, devices: Devices = HERE) -> Moments:
        """The moments without the shared axes, the mean rounded once.

        Those of sub-batches are merged, here and over the devices.
        """
        parts, axes = self[:4], layout.shared
        if layout.sub_batches:
            assert layout.split is not None
            axes = (*axes, layout.split)
            rows = jax.tree.map(lambda a: jnp.swapaxes(a[None], 0, 1 + axes[-1]), parts)
            add = functools.partial(devices.sum, group=devices.group())
            parts = merge(add, over_rows(merge, rows))
        mean, rest, var, count = parts
        assert mean is not None
        assert rest is not None
        squeeze = functools.partial(jnp.squeeze, axis=axes)
        return Moments(squeeze(mean + rest), squeeze(var), squeeze(count))


class Measure(NamedTuple):
    """How to measure; all of it static."""

    layout: Layout
    dtype: jnp.dtype  # of the arithmetic: at least float32
    epsilon: float = 0.0
    centred: bool = True
    devices: Devices = HERE

    def prepare(self, x: jax.Array) -> jax.Array:
        """x as the arithmetic sees it: cast up, and its groups an axis of their own."""
        return x.astype(self.dtype).reshape(self.layout.view)


def measure(how: Measure, x: jax.Array, where: jax.Array | None) -> Statistics:
    """The statistics of x over the elements in `where`, and over the devices."""
    return _measure(how, x, where, how.devices.group())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(how, x, where, group):
    x = how.prepare(x)
    count = _count(how, where)
    mean = rest = None
    if how.centred:
        mean = rounded(_average(how, x, where, count))
        rest = _average(how, x - mean, where, count)
    scale = _scale(how)
    e = centre(x, mean, rest) * scale.astype(x.dtype)
    var = _average(how, square(e), where, count * scale**2)
    mean, rest, var, count = how.devices.merge(merge, (mean, rest, var, count), group)
    count = jnp.broadcast_to(count, var.shape)
    return Statistics(mean, rest, var, count, reciprocal_std(var, how.epsilon, count))


@_measure.defjvp
def _measure_jvp(how, primals, tangents):
    x, where, group = primals
    stats = _measure(how, x, where, group)
    return stats, _tangents(how, x, where, group, stats, tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def measured(how: Measure, x: jax.Array, stats: Statistics) -> Statistics:
    """What `measure(how, x, None)` gave, as that with its derivative, but not measured again."""
    del how, x
    return stats


@measured.defjvp
def _measured_jvp(how, primals, tangents):
    x, stats = primals
    stats = measured(how, x, stats)
    return stats, _tangents(how, x, None, None, stats, tangents[0])


def _tangents(how, x, where, group, stats, tx):
    # checkpoint: the backward pass keeps x, in its own dtype, and computes h again.
    @jax.checkpoint
    def averages(tx, x, where, stats):
        tx = how.prepare(tx)
        h = centre(how.prepare(x), stats.mean, stats.rest) * stats.rstd.astype(how.dtype)
        q = _average(how, real_product(tx, h), where, stats.count)
        t_mean = _average(how, tx, where, stats.count) if how.centred else None
        return t_mean, q

    t_mean, q = how.devices.sum(averages(tx, x, where, stats), group)
    t_rest = None if stats.rest is None else jnp.zeros_like(stats.rest)
    t_var = 2 * q * _std(stats.rstd)
    t_count = jnp.zeros_like(stats.count)
    return Statistics(t_mean, t_rest, t_var, t_count, -(stats.rstd**2) * q)


def merge(add: Callable, parts: tuple) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Mean (a pair), variance and count of several parts together; `add` sums over the parts.

    Chan, Golub and LeVeque (1979), for any number of parts at once. It is the equation above once
    more, its elements now being means, each bringing its own variance and weight: the distances
    from the rounded mean of all are taken before they are rounded, and their own mean is the rest.
    """
    mean, rest, var, count = parts
    # A part of which nothing counted may hold anything.
    var = jnp.where(count > 0, var, 0)
    if mean is None:
        total, power = add((count, count * var))
        return None, None, power / jnp.maximum(total, 1), total
    mean = jnp.where(count > 0, mean, 0)
    total, sum_of_means = add((count, count.astype(mean.dtype) * mean))
    n = jnp.maximum(total, 1)
    mean_of_all = rounded(sum_of_means / n.astype(mean.dtype))
    delta = (mean - mean_of_all) + rest
    share = count / n
    # The share goes into the square, so that this overflows no sooner than measuring the whole.
    root = jnp.where(share > 0, jnp.sqrt(jnp.where(share > 0, share, 1)), 0).astype(delta.dtype)
    powers = share * var + square(root * delta)
    rest_of_all, power = add((share.astype(delta.dtype) * delta, powers))
    return mean_of_all, rest_of_all, jnp.maximum(power - square(rest_of_all), 0), total


def rounded(mean: jax.Array) -> jax.Array:
    """The mean to one bit less, so that everybody takes off the same.

    Without it LLVM contracts x - total * (1 / n) in some of a program's loops to one operation,
    which takes off the mean before it is rounded: then the rest does not belong to it.
    """
    if jnp.iscomplexobj(mean):
        return lax.complex(rounded(jnp.real(mean)), rounded(jnp.imag(mean)))
    kind = jnp.finfo(mean.dtype)
    return lax.reduce_precision(mean, kind.nexp, kind.nmant - 1)


def centre(x: jax.Array, mean: jax.Array | None, rest: jax.Array | None) -> jax.Array:
    """Take the mean off x; what the mean's rounding left out is taken off last."""
    for part in (mean, rest):
        if part is not None:
            x = x - part
    return x


def reciprocal_std(var: jax.Array, epsilon: float, count: jax.Array | None = None) -> jax.Array:
    """(var + epsilon)**-1/2; zero where nothing counted, or where it is infinite.

    Zero makes such elements the bias, with no gradient, where infinity would make them NaN.
    """
    zero = var + epsilon <= 0
    if count is not None:
        zero |= count == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, var + epsilon)))


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """The smallest dtype that holds all of these, also where JAX promotes nothing unasked."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def real_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Re(a conj(b)), which is a b for real numbers."""
    if jnp.iscomplexobj(a):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b


def square(a: jax.Array) -> jax.Array:
    """The squared absolute value, real."""
    return real_product(a, a)


def _average(how: Measure, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    total = jnp.sum(a, how.layout.shared, where=where, keepdims=True)
    return total / jnp.where(count > 0, count, 1).astype(a.dtype)


def _std(rstd: jax.Array) -> jax.Array:
    """1 / rstd, and zero for zero, with derivatives of any order."""
    return jnp.where(rstd > 0, 1 / jnp.where(rstd > 0, rstd, 1), 0)


def _scale(how: Measure) -> jax.Array:
    """About 1 / sqrt(n): squares of what it scales don't overflow. A power of two, so exact."""
    n, dtype = how.layout.count, jnp.finfo(how.dtype).dtype
    if isinstance(n, int):
        return jnp.asarray(2.0 ** -math.ceil(math.log2(max(n, 1)) / 2), dtype)
    # A symbolic shape, of jax.export.
    return lax.rsqrt(jnp.maximum(jnp.asarray(n, dtype), 1))


def count_all(how: Measure) -> Count:
    """The count where nothing is masked."""
    return _count(how, None)


def _count(how: Measure, where: jax.Array | None) -> Count:
    dtype = jnp.finfo(how.dtype).dtype
    view, shared = how.layout.view, how.layout.shared
    if where is None:
        if isinstance(how.layout.count, int):
            return np.full([1] * len(view), how.layout.count, dtype)  # the same on all devices
        shape = [1 if axis in shared else size for axis, size in enumerate(view)]
        return jnp.broadcast_to(jnp.asarray(how.layout.count, dtype), shape)  # symbolic
    # Summed as integers: float32 stops counting at 2**24.
    counted = jnp.broadcast_to(where, view).astype(jnp.int32)
    return jnp.sum(counted, shared, keepdims=True).astype(dtype)
