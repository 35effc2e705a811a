"""Mean and variance: measured, merged, and their derivative.

One float32 cannot hold the mean of data such as 1e4 + noise with the precision that x - mean needs.
So the mean is subtracted twice: with m the rounded mean, d = x - m is nearly exact, and the mean c
of d is the part that rounding m lost. Wherever a mean is used again, it is kept as the unevaluated
sum of a high and a low part, (mean_high, mean_low) = (m, c), as in double-double arithmetic
(Dekker, 1971).

The derivative of the statistics is written by hand. With e = x - mean, r = (var + epsilon)**-1/2,
h = e r, and avg the average over the counted elements (and the devices), the tangents are

    t_mean = avg(tx),    t_var = 2 avg(tx e) = 2 q / r,    t_r = -r**3 / 2 t_var = -r**2 q

with q = avg(tx h), for complex x avg(Re(tx conj(h))). Written with h, nothing under- or overflows
where r**3 or e**2 would. JAX transposes this into the backward pass; together with y = e r
(standardize.py) it is the closed form, including the terms of the statistics:

    ty = r (tx - avg(tx) - h avg(tx h)),    dx = r (dy - w / n (sum(dy) + h sum(dy h)))

where w is one for the counted elements and n is their number. dy flows to every position; the
statistics' terms flow only to positions that were counted.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxnorm.core.arithmetic import (
    drop_last_bit,
    real_dtype,
    real_product,
    reciprocal_or_zero,
    reciprocal_std,
    square,
)
from jaxnorm.core.devices import LOCAL, Devices, over_rows
from jaxnorm.core.layout import Layout
from jaxnorm.core.spec import NormSpec

Count = jax.Array | np.ndarray  # a NumPy array is the same on all devices


@functools.partial(export.register_namedtuple_serialization, serialized_name="jaxnorm.Moments")
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
    """What standardizing needs; reduction axes are kept with size one.

    `mean_high + mean_low` is the mean to twice the precision. Norms that do not subtract the mean
    have neither, and their `var` is the mean square.
    """

    mean_high: jax.Array | None
    mean_low: jax.Array | None
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    rstd: jax.Array

    def moments(self, layout: Layout, devices: Devices = LOCAL) -> Moments:
        """The moments without the reduction axes, the mean rounded once.

        Those of sub-batches are merged, on this device and over the devices.
        """
        parts, axes = self[:4], layout.reduction_axes
        if layout.sub_batches:
            assert layout.split is not None
            axes = (*axes, layout.split)
            rows = jax.tree.map(lambda a: jnp.swapaxes(a[None], 0, 1 + axes[-1]), parts)
            add = functools.partial(devices.sum, group=devices.group())
            parts = merge(add, over_rows(merge, rows))
        mean_high, mean_low, var, count = parts
        assert mean_high is not None
        assert mean_low is not None
        squeeze = functools.partial(jnp.squeeze, axis=axes)
        return Moments(squeeze(mean_high + mean_low), squeeze(var), squeeze(count))


def statistics(spec: NormSpec, x: jax.Array, where: jax.Array | None = None) -> Statistics:
    """The statistics of x over the elements in `where`, and over the devices."""
    return _measured(spec, x, where, spec.statistics_devices.group())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measured(spec, x, where, group):
    x = spec.prepare(x)
    count = _count(spec, where)
    mean_high = mean_low = None
    if spec.subtract_mean:
        mean_high = drop_last_bit(_average(spec, x, where, count))
        mean_low = _average(spec, x - mean_high, where, count)
    scale = _square_scale(spec)
    e = subtract(x, mean_high, mean_low) * scale.astype(x.dtype)
    var = _average(spec, square(e), where, count * scale**2)
    parts = (mean_high, mean_low, var, count)
    mean_high, mean_low, var, count = spec.statistics_devices.merge(merge, parts, group)
    count = jnp.broadcast_to(count, var.shape)
    return Statistics(mean_high, mean_low, var, count, reciprocal_std(var, spec.epsilon, count))


@_measured.defjvp
def _measured_jvp(spec, primals, tangents):
    x, where, group = primals
    stats = _measured(spec, x, where, group)
    return stats, _tangents(spec, x, where, group, stats, tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def known_statistics(spec: NormSpec, x: jax.Array, stats: Statistics) -> Statistics:
    """`stats`, which must be `statistics(spec, x)`: its derivative without measuring x again."""
    del spec, x
    return stats


@known_statistics.defjvp
def _known_statistics_jvp(spec, primals, tangents):
    x, stats = primals
    stats = known_statistics(spec, x, stats)
    return stats, _tangents(spec, x, None, None, stats, tangents[0])


def _tangents(spec, x, where, group, stats, tx):
    # checkpoint: the backward pass keeps x, in its own dtype, and computes h again.
    @jax.checkpoint
    def averages(tx, x, where, stats):
        tx = spec.prepare(tx)
        h = subtract(spec.prepare(x), stats.mean_high, stats.mean_low)
        h = h * stats.rstd.astype(spec.compute_dtype)
        q = _average(spec, real_product(tx, h), where, stats.count)
        t_mean = _average(spec, tx, where, stats.count) if spec.subtract_mean else None
        return t_mean, q

    t_mean, q = spec.statistics_devices.sum(averages(tx, x, where, stats), group)
    t_low = None if stats.mean_low is None else jnp.zeros_like(stats.mean_low)
    t_var = 2 * q * reciprocal_or_zero(stats.rstd)
    t_count = jnp.zeros_like(stats.count)
    return Statistics(t_mean, t_low, t_var, t_count, -(stats.rstd**2) * q)


def merge(add: Callable, parts: tuple) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Mean (high and low part), variance and count of several parts; `add` sums over the parts.

    Chan, Golub and LeVeque (1979), for any number of parts at once. This measures again, with
    means for elements, each of which has a variance and a weight: the distances from the rounded
    mean of all are taken before they are rounded, and their mean is the low part.
    """
    mean_high, mean_low, var, count = parts
    # The numbers of a part in which nothing counted may be anything.
    var = jnp.where(count > 0, var, 0)
    if mean_high is None:
        total, power = add((count, count * var))
        return None, None, power / jnp.maximum(total, 1), total
    mean_high = jnp.where(count > 0, mean_high, 0)
    total, sum_of_means = add((count, count.astype(mean_high.dtype) * mean_high))
    n = jnp.maximum(total, 1)
    high_of_all = drop_last_bit(sum_of_means / n.astype(mean_high.dtype))
    delta = (mean_high - high_of_all) + mean_low
    share = count / n
    # The share is part of the square, so that this overflows no sooner than measuring the whole.
    root = jnp.where(share > 0, jnp.sqrt(jnp.where(share > 0, share, 1)), 0).astype(delta.dtype)
    powers = share * var + square(root * delta)
    low_of_all, power = add((share.astype(delta.dtype) * delta, powers))
    return high_of_all, low_of_all, jnp.maximum(power - square(low_of_all), 0), total


def subtract(x: jax.Array, high: jax.Array | None, low: jax.Array | None) -> jax.Array:
    """x less the mean: first its high part, which is nearly exact, then its low part."""
    for part in (high, low):
        if part is not None:
            x = x - part
    return x


def count_all(spec: NormSpec) -> Count:
    """The count where nothing is masked."""
    dtype, count = real_dtype(spec.compute_dtype), spec.layout.count
    if isinstance(count, int):
        return np.full([1] * len(spec.layout.view), count, dtype)  # the same on all devices
    # A symbolic shape, of jax.export.
    return jnp.broadcast_to(jnp.asarray(count, dtype), spec.layout.statistics_shape)


def _count(spec: NormSpec, where: jax.Array | None) -> Count:
    if where is None:
        return count_all(spec)
    # Summed as integers: float32 stops counting at 2**24.
    counted = jnp.broadcast_to(where, spec.layout.view).astype(jnp.int32)
    total = jnp.sum(counted, spec.layout.reduction_axes, keepdims=True)
    return total.astype(real_dtype(spec.compute_dtype))


def _average(spec: NormSpec, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    total = jnp.sum(a, spec.layout.reduction_axes, where=where, keepdims=True)
    return total / jnp.where(count > 0, count, 1).astype(a.dtype)


def _square_scale(spec: NormSpec) -> jax.Array:
    """About 1 / sqrt(n), so that sums of scaled squares don't overflow; exact, a power of two."""
    n, dtype = spec.layout.count, real_dtype(spec.compute_dtype)
    if isinstance(n, int):
        return jnp.asarray(2.0 ** -math.ceil(math.log2(max(n, 1)) / 2), dtype)
    # A symbolic shape, of jax.export.
    return lax.rsqrt(jnp.maximum(jnp.asarray(n, dtype), 1))
