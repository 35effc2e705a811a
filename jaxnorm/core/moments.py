"""Mean and variance: measured, merged, and their derivative.

One float32 cannot hold the mean of data such as 1e4 + noise with the precision that x - mean needs.
So the mean is subtracted twice: with m the rounded mean, d = x - m is nearly exact, and the mean c
of d is the part that rounding m lost. Wherever a mean is used again, it is kept as the unevaluated
sum of a high and a low part, (mean_high, mean_low) = (m, c), as in double-double arithmetic
(Dekker, 1971).

A pass over x costs more than anything else here. So m need not be the mean: any number near it will
do, and `_at_once` takes the mean of a sample.

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
    return measured(spec, x, where, group)


@_statistics.defjvp
def _statistics_jvp(spec, primals, tangents):
    x, where, group = primals
    stats = _statistics(spec, x, where, group)
    kept = Kept(x, where, group, stats)
    moved = computed_again(spec, functools.partial(averages, spec), kept, tangents[0])
    return stats, tangents_of(stats, *moved)


def measured(
    spec: NormSpec, x: jax.Array, where: jax.Array | None, group: jax.Array | None
) -> Statistics:
    """The statistics; their derivative is not that of this function, but `averages`."""
    count = count_of(spec, where)
    high = low = None
    if not spec.subtract_mean:
        var = mean_square(spec, spec.prepare(x), where, count)
    elif where is None and spec.layout.rows and not spec.differentiated:
        # If nothing but y is wanted, XLA for GPUs keeps each row in one kernel, and reads it once:
        # not for a part of the row, but for any number of sums that follow each other.
        by_steps, at_once = (
            functools.partial(f, spec, where=None, count=count) for f in (_in_three_sums, _at_once)
        )
        high, low, var = platform_dependent(x, cuda=by_steps, rocm=by_steps, default=at_once)
    else:
        high, low, var = _at_once(spec, x, where, count)
    high, low, var, total = spec.statistics_devices.merge(merge, (high, low, var, count), group)
    rstd = reciprocal_std(var, spec.epsilon, None if where is None else total)
    return Statistics(high, low, var, jnp.broadcast_to(total, var.shape), rstd)


def _at_once(spec, x, where, count) -> tuple[jax.Array, jax.Array, jax.Array]:
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
        pivot = spec.layout.sum(spec.prepare(sample) * spec.layout.spread(share))
    else:
        pivot = drop_last_bit(average(spec, spec.prepare(x), where, count))
    d = spec.prepare(x) - spec.layout.spread(pivot)
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


def _in_three_sums(spec, x, where, count) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, each by a pass of its own."""
    high = drop_last_bit(average(spec, spec.prepare(x), where, count))
    low = average(spec, less_mean(spec, x, high, None), where, count)
    return high, low, mean_square(spec, less_mean(spec, x, high, low), where, count)


class Kept(NamedTuple):
    """What the derivative of a norm needs: all that is kept for the backward pass."""

    x: jax.Array
    where: jax.Array | None
    group: jax.Array | None
    stats: Statistics
    params: Any = None


def computed_again(spec: NormSpec, tangent: Callable, kept: Kept, tangents: Any) -> Any:
    """`tangent(kept, tangents)`, whose transpose computes again what follows from `kept`.

    The barrier keeps XLA from finding that the forward pass has computed the same, and keeping
    that. It holds back what is kept and not the tangents: their transpose, dy, may be fused with
    whatever computes it, such as a matmul. Nor the count: it is mostly a constant, which would have
    to be written to memory. The mean's low part has no tangent; from jax 0.11 on, JAX can't
    transpose a barrier if some tangents are zeros that it does not know of.
    """
    if spec.devices.under_vmap:
        # JAX could not differentiate a `psum` in jax.checkpoint again.
        return tangent(_finite(spec, kept), tangents)

    def function(kept, tangents):
        low = lax.stop_gradient(kept.stats.mean_low)
        stats = kept.stats._replace(mean_low=low, count=None)
        x, stats, params = lax.optimization_barrier((kept.x, stats, kept.params))
        stats = stats._replace(count=kept.stats.count)
        return tangent(_finite(spec, kept._replace(x=x, stats=stats, params=params)), tangents)

    return jax.checkpoint(function, prevent_cse=False)(kept, tangents)


def _finite(spec: NormSpec, kept: Kept) -> Kept:
    """What is kept, with a number where x does not count and can't be standardized.

    A cotangent there may be zero, but zero times NaN or infinity is NaN, in each sum over x.
    """
    if kept.where is None:
        return kept
    h = lax.stop_gradient(standardized(spec, kept.x, kept.stats))
    return kept._replace(x=jnp.where(kept.where | jnp.isfinite(h), kept.x, 0))


def averages(spec: NormSpec, kept: Kept, tx: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """avg(tx), or None if the mean is not subtracted, and avg(tx h)."""
    x, where, group, stats, _ = kept
    tx = spec.prepare(tx)
    q = average(spec, real_product(tx, standardized(spec, x, stats)), where, stats.count)
    t_mean = average(spec, tx, where, stats.count) if spec.subtract_mean else None
    return spec.statistics_devices.sum((t_mean, q), group)


def tangents_of(stats: Statistics, t_mean: jax.Array | None, q: jax.Array) -> Statistics:
    """The tangents of the statistics."""
    t_low = None if stats.mean_low is None else jnp.zeros_like(stats.mean_low)
    t_var = 2 * q * reciprocal_or_zero(stats.rstd)
    return Statistics(t_mean, t_low, t_var, jnp.zeros_like(stats.count), -(stats.rstd**2) * q)


def standardized(spec: NormSpec, x: jax.Array, stats: Statistics) -> jax.Array:
    """h = (x - mean) * rstd."""
    e = less_mean(spec, x, stats.mean_high, stats.mean_low)
    return e * spec.layout.spread(spec.prepare(stats.rstd))


def fits(a: jax.Array, x: jax.Array) -> jax.Array:
    """`a`, which broadcasts against x."""
    del x
    return a


def less_mean(
    spec: NormSpec,
    x: jax.Array,
    high: jax.Array | None,
    low: jax.Array | None,
    fit: Callable = fits,
) -> jax.Array:
    """x less the mean: first its high part, which is nearly exact, then its low part."""
    e = spec.prepare(x)
    for part in (high, low):
        if part is not None:
            e = e - fit(spec.layout.spread(spec.prepare(part)), x)
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
