"""Mean and variance: measured in one pass over x, and merged.

One float32 cannot hold the mean of data such as 1e4 + noise with the precision that x - mean needs.
So the mean is subtracted twice: with m the rounded mean, d = x - m is nearly exact, and the mean c
of d is the part that rounding m lost. Wherever a mean is used again, it is kept as the unevaluated
sum of a high and a low part, (mean_high, mean_low) = (m, c), as in double-double arithmetic
(Dekker, 1971).

A pass over x costs more than all other work. m need not be the mean: any number near it serves, so
`_in_one_pass` takes the mean of a sample.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from jaxnorm.core.arithmetic import (
    drop_last_bit,
    real_product,
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
    """Mean, biased variance, and the number of elements they were measured over.

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
    """The statistics that standardize x; reduction axes are kept with size one.

    `mean_high + mean_low` is the mean to twice the precision. In norms that do not subtract the
    mean both are None, and `var` is the mean square.
    """

    mean_high: jax.Array | None
    mean_low: jax.Array | None
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    rstd: jax.Array

    def moments(self, layout: Layout, devices: Devices = LOCAL) -> Moments:
        """Return the moments without the reduction axes; the mean is rounded once.

        Merge the moments of sub-batches, on this device and over the devices.
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


def measure(
    spec: NormSpec, x: jax.Array, where: jax.Array | None, group: jax.Array | None
) -> Statistics:
    """Measure the statistics. JAX does not differentiate this; statistics.py has the derivative."""
    count = count_of(spec, where)
    high = low = None
    if not spec.subtract_mean:
        var = mean_square(spec, spec.prepare(x), where, count)
    elif where is None and spec.layout.rows and not spec.differentiated:
        # For y alone, XLA for GPUs keeps each row in one kernel and reads it once, however many
        # sums follow each other; not so if a sum is over a part of the row, such as a sample.
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
    """Measure the mean's high and low part and the variance, in one pass over x and a sample.

    With p the mean of the sample and d = x - p, the low part is avg(d) and the variance
    avg(d**2) - avg(d)**2. The cancellation in it is bounded for any data. If the sample has k of n
    elements, (p - mean)**2 <= var (n / k - 1): the sum of (x - mean)**2 is at least k (p - mean)**2
    over the sample, and at least k**2 / (n - k) (p - mean)**2 over the other elements, because
    their sum of x - mean is minus that of the sample.
    """
    if where is None:
        # Sample before the cast, or XLA writes x in float32 to memory. Divide before the sum: then
        # the pivot is a sum, which LLVM can't contract with the subtraction from x. `drop_last_bit`
        # would prevent that too, but is one more kernel on a GPU.
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
    # The mean is pivot + near. With `low` in place of `near`, XLA would square the sum before it
    # divides it, which may overflow.
    near = drop_last_bit(low)
    var = power / divisor - real_product(near, low + (low - near))
    rounding = 8 * jnp.finfo(var.dtype).eps * square(near)
    high = pivot + near
    return high, (pivot - high) + near, zero_where(var <= rounding, var)


def _in_three_passes(spec, x, where, count) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Measure the same by three passes over x."""
    high = drop_last_bit(average(spec, spec.prepare(x), where, count))
    low = average(spec, subtract_mean(spec, x, high, None), where, count)
    return high, low, mean_square(spec, subtract_mean(spec, x, high, low), where, count)


def fits(a: jax.Array, x: jax.Array) -> jax.Array:
    """Return `a`, which broadcasts against x as it is."""
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
    """Merge mean (high and low part), variance and count of several parts; `add` sums over parts.

    This is the equation of Chan, Golub and LeVeque (1979), for any number of parts. As in
    `_in_one_pass`, the distances of the parts' means from the rounded mean of all are nearly exact,
    and their average is the low part.
    """
    mean_high, mean_low, var, count = parts
    # A part without counted elements may hold any numbers.
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
