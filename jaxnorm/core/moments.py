"""Mean and variance: measured, merged, and their derivative.

One float32 cannot hold the mean of data such as 1e4 + noise with the precision that x - mean needs.
So the mean is subtracted twice: with m the rounded mean, d = x - m is nearly exact, and the mean c
of d is the part that rounding m lost. Wherever a mean is used again, it is kept as the unevaluated
sum of a high and a low part, (mean_high, mean_low) = (m, c), as in double-double arithmetic
(Dekker, 1971).

A pass over x costs more than anything else here. So m need not be the mean: any number near it will
do, and `_in_one_pass` takes the mean of a sample.

The derivative of the statistics is written by hand. With e = x - mean, rstd = (var +
epsilon)**-1/2, x_hat = e rstd, and avg the average over the counted elements (and the devices), the
tangents are

    t_mean = avg(tx),    t_var = 2 avg(tx e) = 2 q / rstd,    t_rstd = -rstd**3 / 2 t_var = -rstd**2
    q

with q = avg(tx x_hat), for complex x avg(Re(tx conj(x_hat))). With x_hat instead of e, nothing
under- or overflows where rstd**3 or e**2 would. JAX transposes this into the backward pass.
Together with y = x_hat (standardize.py) it is the closed form, including the terms of the
statistics:

    ty = rstd (tx - avg(tx) - x_hat avg(tx x_hat))
    dx = rstd (dy - w / n (sum(dy) + x_hat sum(dy x_hat)))

where w is one for the counted elements and n is their number. Every position gets dy; only counted
positions get the terms of the statistics.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from jaxnorm.core.arithmetic import (
    drop_last_bit,
    real_product,
    reciprocal_or_zero,
    reciprocal_std,
    square,
    zero_where,
)
from jaxnorm.core.counts import at_least_one, average, count_of, mean_square, squares
from jaxnorm.core.devices import LOCAL, Devices, over_rows
from jaxnorm.core.exporting import platform_dependent
from jaxnorm.core.layout import Layout
from jaxnorm.core.spec import NormSpec


@functools.partial(export.register_namedtuple_serialization, serialized_name="jaxnorm.Moments")
class Moments(NamedTuple):
    """Mean, biased variance, and the number of elements that they were taken over.

    Attributes:
      mean: the mean, complex for complex elements.
      var: the mean squared distance from the mean, real.
      count: how many elements counted (after `where`), in the dtype of `var`: float32 holds each
        number up to 2**24.
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
        parts, axis = self[:4], layout.split
        if layout.sub_batches:
            assert axis is not None
            rows = jax.tree.map(lambda a: jnp.swapaxes(a[None], 0, 1 + axis), parts)
            add = functools.partial(devices.sum, group=devices.group())
            parts = merge(add, over_rows(merge, rows))
        mean_high, mean_low, var, count = parts
        assert mean_high is not None
        assert mean_low is not None
        squeeze = functools.partial(jnp.squeeze, axis=layout.reduction_axes)
        return Moments(squeeze(mean_high + mean_low), squeeze(var), squeeze(count))


def statistics(spec: NormSpec, x: jax.Array, where: jax.Array | None = None) -> Statistics:
    """The statistics of x over the elements in `where`, and over the devices."""
    return _statistics(spec, x, where, spec.statistics_devices.group())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _statistics(spec, x, where, group):
    return measure(spec, x, where, group)


@_statistics.defjvp
def _statistics_jvp(spec, primals, tangents):
    x, where, group = primals
    stats = _statistics(spec, x, where, group)
    residuals = Residuals(x, where, group, stats)
    parts = rematerialized(spec, functools.partial(averages, spec), residuals, tangents[0])
    return stats, statistics_jvp(stats, *parts)


def measure(
    spec: NormSpec, x: jax.Array, where: jax.Array | None, group: jax.Array | None
) -> Statistics:
    """Measure the statistics. JAX does not differentiate this: their derivative is `averages`."""
    count = count_of(spec, where)
    high = low = None
    if not spec.subtract_mean:
        var = mean_square(spec, spec.prepare(x), where, count)
    elif where is None and spec.layout.rows and not spec.differentiated:
        # If nothing but y is wanted, XLA for GPUs keeps each row in one kernel, and reads it once:
        # not for a part of the row, but for any number of sums that follow each other.
        in_three_passes, in_one_pass = (
            functools.partial(f, spec, where=None, count=count)
            for f in (_in_three_passes, _in_one_pass)
        )
        high, low, var = platform_dependent(
            x, cuda=in_three_passes, rocm=in_three_passes, default=in_one_pass
        )
    else:
        high, low, var = _in_one_pass(spec, x, where, count)
    high, low, var, total = spec.statistics_devices.merge(merge, (high, low, var, count), group)
    rstd = reciprocal_std(var, spec.epsilon, None if where is None else total)
    return Statistics(high, low, var, jnp.broadcast_to(total, var.shape), rstd)


def _in_one_pass(spec, x, where, count) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean's high and low part and the variance, by one pass over x and one over a sample.

    With p the mean of the sample and d = x - p, the low part is avg(d) and the variance
    avg(d**2) - avg(d)**2. What cancels there is bounded for any data: if the sample has k of n
    elements, (p - mean)**2 <= var (n / k - 1), since sum((x - mean)**2) over the sample is at least
    k (p - mean)**2, and over the others, whose sum of distances is the same but for the sign, at
    least k**2 / (n - k) times that.
    """
    if where is None:
        # The sample is taken before the cast, or XLA writes x in float32. It is divided before it
        # is summed, so that the pivot is a sum and nothing that LLVM might contract with what it is
        # subtracted from (`drop_last_bit`): that rounding would be one more kernel on a GPU.
        sample = spec.layout.sample(x)
        part = count if sample is x else count * (sample.size / x.size)
        share = spec.prepare(1 / at_least_one(part))
        pivot = spec.layout.sum(spec.prepare(sample) * spec.layout.broadcast_statistics(share))
    else:
        pivot = drop_last_bit(average(spec, spec.prepare(x), where, count))
    d = spec.prepare(x) - spec.layout.broadcast_statistics(pivot)
    scaled, divisor = squares(spec, d, count)
    total, power = spec.layout.sums((d, scaled), where)
    low = total / at_least_one(count).astype(d.dtype)
    # The mean is pivot + near. Of `low` itself, XLA would take the square of the sum before it is
    # divided, which may overflow.
    near = drop_last_bit(low)
    var = power / divisor - real_product(near, low + (low - near))
    rounding = 8 * jnp.finfo(var.dtype).eps * square(near)
    high = pivot + near
    return high, (pivot - high) + near, zero_where(var <= rounding, var)


def _in_three_passes(spec, x, where, count) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, each by a pass of its own."""
    high = drop_last_bit(average(spec, spec.prepare(x), where, count))
    low = average(spec, subtract_mean(spec, x, high, None), where, count)
    return high, low, mean_square(spec, subtract_mean(spec, x, high, low), where, count)


class Residuals(NamedTuple):
    """What is kept for the backward pass of a norm; its derivative needs nothing else."""

    x: jax.Array
    where: jax.Array | None
    group: jax.Array | None
    stats: Statistics
    params: Any = None


def rematerialized(spec: NormSpec, jvp: Callable, residuals: Residuals, tangents: Any) -> Any:
    """Compute `jvp(residuals, tangents)`; its transpose recomputes what depends on the residuals.

    Without the barrier, XLA would notice that the forward pass computes the same, and keep it. The
    barrier is around the residuals and not around the tangents: dy, their transpose, may be fused
    with the operation that computes it, such as a matmul. The count is left out: it is mostly a
    constant, which would have to be written to memory. The mean's low part has no tangent; from jax
    0.11 on, JAX can't transpose a barrier if it does not know that some tangents are zeros.
    """
    if spec.devices.under_vmap:
        # JAX could not differentiate a `psum` in jax.checkpoint again.
        return jvp(_finite(spec, residuals), tangents)

    def function(residuals, tangents):
        low = lax.stop_gradient(residuals.stats.mean_low)
        stats = residuals.stats._replace(mean_low=low, count=None)
        x, stats, params = lax.optimization_barrier((residuals.x, stats, residuals.params))
        stats = stats._replace(count=residuals.stats.count)
        return jvp(_finite(spec, residuals._replace(x=x, stats=stats, params=params)), tangents)

    return jax.checkpoint(function, prevent_cse=False)(residuals, tangents)


def _finite(spec: NormSpec, residuals: Residuals) -> Residuals:
    """Replace x by zero where it does not count and x_hat is not finite.

    A cotangent there may be zero, but zero times NaN or infinity is NaN, in each sum over x.
    """
    if residuals.where is None:
        return residuals
    x_hat = lax.stop_gradient(compute_x_hat(spec, residuals.x, residuals.stats))
    return residuals._replace(x=jnp.where(residuals.where | jnp.isfinite(x_hat), residuals.x, 0))


def averages(
    spec: NormSpec, residuals: Residuals, tx: jax.Array
) -> tuple[jax.Array | None, jax.Array]:
    """Return avg(tx), or None if the mean is not subtracted, and avg(tx x_hat)."""
    x, where, group, stats, _ = residuals
    tx = spec.prepare(tx)
    q = average(spec, real_product(tx, compute_x_hat(spec, x, stats)), where, stats.count)
    t_mean = average(spec, tx, where, stats.count) if spec.subtract_mean else None
    return spec.statistics_devices.sum((t_mean, q), group)


def statistics_jvp(stats: Statistics, t_mean: jax.Array | None, q: jax.Array) -> Statistics:
    """Return the tangents of the statistics, by those averages."""
    t_low = None if stats.mean_low is None else jnp.zeros_like(stats.mean_low)
    t_var = 2 * q * reciprocal_or_zero(stats.rstd)
    return Statistics(t_mean, t_low, t_var, jnp.zeros_like(stats.count), -(stats.rstd**2) * q)


def compute_x_hat(spec: NormSpec, x: jax.Array, stats: Statistics) -> jax.Array:
    """Compute x_hat = (x - mean) * rstd."""
    e = subtract_mean(spec, x, stats.mean_high, stats.mean_low)
    return e * spec.layout.broadcast_statistics(spec.prepare(stats.rstd))


def fits(a: jax.Array, x: jax.Array) -> jax.Array:
    """`a`, which broadcasts against x."""
    del x
    return a


def subtract_mean(
    spec: NormSpec,
    x: jax.Array,
    high: jax.Array | None,
    low: jax.Array | None,
    fit: Callable = fits,
) -> jax.Array:
    """Subtract the mean: first its high part, which is nearly exact, then its low part."""
    e = spec.prepare(x)
    for part in (high, low):
        if part is not None:
            e = e - fit(spec.layout.broadcast_statistics(spec.prepare(part)), x)
    return e


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
    var = power - square(low_of_all)
    return high_of_all, low_of_all, zero_where(var < 0, var), total
