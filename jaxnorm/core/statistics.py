"""The statistics of x with their derivative, and what is kept for the backward pass.

The derivative is written by hand. With e = x - mean, rstd = (var + epsilon)**-1/2, x_hat = e rstd,
and avg the average over the counted elements (and the devices), the tangents are

    t_mean = avg(tx)
    t_var = 2 avg(tx e) = 2 q / rstd
    t_rstd = -rstd**3 / 2 t_var = -rstd**2 q

with q = avg(tx x_hat), for complex x avg(Re(tx conj(x_hat))). Written with x_hat instead of e, the
equations neither under- nor overflow where rstd**3 or e**2 would. JAX transposes them into the
backward pass. For y = x_hat (standardize.py) this is the closed form, with the terms of the
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
from jax import lax

from jaxnorm.core.arithmetic import real_product, reciprocal_or_zero
from jaxnorm.core.counts import average
from jaxnorm.core.moments import Statistics, measure, subtract_mean
from jaxnorm.core.spec import NormSpec


def statistics(spec: NormSpec, x: jax.Array, where: jax.Array | None = None) -> Statistics:
    """Return the statistics of x over the elements in `where`, and over the devices."""
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


class Residuals(NamedTuple):
    """The arrays that the backward pass of a norm keeps; its derivative needs no others."""

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
