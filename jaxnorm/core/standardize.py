"""The equation of every norm: y = (x - mean) * rstd * (scale_offset + scale) + bias.

statistics.py has the derivative of the statistics; JAX differentiates the rest. The backward pass
keeps x in its own dtype and the statistics, never the standardized x (x_hat), which it recomputes.

With a residual, x is the residual sum. y and the statistics are those of the sum before it is
rounded. The rounded sum is kept, and the derivative standardizes it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import DTypeLike

from jaxnorm.core.arithmetic import reciprocal_or_zero
from jaxnorm.core.moments import Statistics, fits, measure, subtract_mean
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.statistics import (
    Residuals,
    averages,
    compute_x_hat,
    rematerialized,
    statistics_jvp,
)
from jaxnorm.core.sums import expand, with_exact_sums


@functools.partial(export.register_namedtuple_serialization, serialized_name="jaxnorm.NormParams")
class NormParams(NamedTuple):
    """Scale and bias of a norm: y = standardized x * scale + bias; each of them is optional.

    Attributes:
      scale: the factor, or None for one. Also called gamma or weight.
      bias: the summand, or None for zero. Also called beta.
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


def init_params(
    features: int | tuple[int, ...],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> NormParams:
    """Make initial parameters, which change nothing: scale one, bias zero.

    Args:
      features: the number of features, or the shape of the axes that are normalized.
      scale: whether there is a scale.
      bias: whether there is a bias.
      dtype: of scale and bias.

    Returns:
      NormParams whose arrays have the shape of the features.

    Examples:
      >>> import jaxnorm as jn
      >>> jn.init_params(3)
      NormParams(scale=Array([1., 1., 1.], dtype=float32), bias=Array([0., 0., 0.], dtype=float32))
      >>> jn.init_params((4, 5), bias=False).scale.shape
      (4, 5)
    """
    return NormParams(
        jnp.ones(features, dtype) if scale else None,
        jnp.zeros(features, dtype) if bias else None,
    )


def standardize(
    spec: NormSpec,
    x: jax.Array,
    mean_high: jax.Array | None,
    mean_low: jax.Array | None,
    rstd: jax.Array,
    params: NormParams,
    fit: Callable = fits,
) -> jax.Array:
    """Apply the equation, in the dtype of the arithmetic.

    If JAX differentiates it, pass `expand` as `fit`, so that gradients are exact sums.
    """
    broadcast, prepare = spec.layout.broadcast_statistics, spec.prepare
    factor, offset = broadcast(prepare(rstd)), None
    if params.scale is not None:
        factor = factor * effective_scale(spec, params.scale)
    if params.bias is not None:
        offset = prepare(spec.layout.broadcast(params.bias))
    if mean_low is not None and x.dtype.itemsize == 2:
        # x - high is nearly exact, so the low part may be subtracted last, with the bias. For batch
        # norm this is one operation less for each element. With more operations, XLA for TPUs does
        # not repeat them in each matmul that reads y, but writes y to memory.
        low = broadcast(mean_low) * factor
        offset, mean_low = (-low if offset is None else offset - low), None
    y = subtract_mean(spec, x, mean_high, mean_low, fit) * fit(factor, x)
    return (y if offset is None else y + fit(offset, x)).astype(spec.dtype)


def effective_scale(spec: NormSpec, scale: jax.Array) -> jax.Array:
    """Return the factor of x_hat. The offset is added here: in bfloat16, 1 + 0.00390625 is 1."""
    scale = spec.prepare(spec.layout.broadcast(scale))
    return scale + spec.scale_offset if spec.scale_offset else scale


def affine(spec: NormSpec, x_hat: jax.Array, params: NormParams) -> jax.Array:
    """Apply scale and bias to the standardized x, or to what takes its place."""
    y = x_hat
    if params.scale is not None:
        y = y * expand(effective_scale(spec, params.scale), y)
    if params.bias is not None:
        y = y + expand(spec.prepare(spec.layout.broadcast(params.bias)), y)
    return y.astype(spec.dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def undo_standardize(
    spec: NormSpec, y: jax.Array, mean: jax.Array, rstd: jax.Array, params: NormParams
) -> jax.Array:
    """Solve the equation for x."""
    x = spec.prepare(y)
    if params.bias is not None:
        x = x - expand(spec.prepare(spec.layout.broadcast(params.bias)), x)
    if params.scale is not None:
        x = x / expand(effective_scale(spec, params.scale), x)
    std = spec.prepare(reciprocal_or_zero(rstd))
    return (x * expand(std, x) + expand(mean, x)).astype(spec.dtype)


# By statistics that are given. The backward pass recomputes this.
standardize_by = jax.checkpoint(functools.partial(standardize, fit=expand), static_argnums=0)


def measure_and_standardize(
    spec: NormSpec,
    x: jax.Array,
    residual: jax.Array | None,
    params: NormParams,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """Compute y, the statistics of x, and the residual sum: the formula of every norm."""
    return _norm(spec, x, residual, params, where, spec.statistics_devices.group())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(spec, x, residual, params, where, group):
    residual_sum = None
    if residual is not None:
        # Without the barrier, the matmul that computes x writes it in float32 for this sum.
        x, residual = lax.optimization_barrier((x, residual))
        exact = spec.prepare(x) + spec.prepare(residual)
        x, residual_sum = exact, exact.astype(x.dtype)
    stats = measure(spec, x, where, group)
    y = standardize(spec, x, stats.mean_high, stats.mean_low, stats.rstd, params)
    return y, stats, residual_sum


@_norm.defjvp
def _norm_jvp(spec, primals, tangents):
    x, residual, params, where, group = primals
    tx, tresidual, tparams, *_ = tangents
    y, stats, residual_sum = _norm(spec._replace(differentiated=True), *primals)
    if residual is not None:
        x, tx = residual_sum, tx + tresidual
    residuals = Residuals(x, where, group, stats, params)
    return (y, stats, residual_sum), norm_jvp(spec, residuals, tx, tparams)


def standardize_measured(
    spec: NormSpec,
    x: jax.Array,
    stats: Statistics,
    params: NormParams,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Statistics]:
    """Compute y by statistics that were measured of this x; return them with their derivative.

    The derivative is the same as in `measure_and_standardize`. The parameters may depend on the
    statistics.
    """
    return _norm_of_measured(spec, x, params, where, spec.statistics_devices.group(), stats)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm_of_measured(spec, x, params, where, group, stats):
    y = standardize(spec, x, stats.mean_high, stats.mean_low, stats.rstd, params)
    return y, stats


@_norm_of_measured.defjvp
def _norm_of_measured_jvp(spec, primals, tangents):
    x, params, where, group, _ = primals
    tx, tparams, *_ = tangents
    y, stats = _norm_of_measured(spec, *primals)
    ty, tstats, _ = norm_jvp(spec, Residuals(x, where, group, stats, params), tx, tparams)
    return (y, stats), (ty, tstats)


def norm_jvp(
    spec: NormSpec, residuals: Residuals, tx: jax.Array, tparams: NormParams
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """Return the tangents of y, of the statistics, and of the residual sum if there is one."""
    residual_sum = None
    if spec.has_residual:
        # Cast once, so that the transpose adds the cotangents of y and of the residual sum, then
        # rounds.
        tx = spec.prepare(tx)
        residual_sum = tx.astype(residuals.x.dtype)
    jvp = functools.partial(_jvp, spec)
    ty, *parts = rematerialized(spec, jvp, residuals, (tx, tparams))
    return ty, statistics_jvp(residuals.stats, *parts), residual_sum


def _jvp(spec, residuals, tangents):
    tx, tparams = tangents
    x, stats, params = residuals.x, residuals.stats, residuals.params
    t_mean, q = averages(spec, residuals, tx)
    rest = with_exact_sums(functools.partial(_rest, spec), x, stats, params, tparams, t_mean, q)
    return (_factor(spec, stats, params) * spec.prepare(tx) + rest).astype(spec.dtype), t_mean, q


def _rest(spec, exact, x, stats, params, tparams, t_mean, q):
    """Compute the last two terms of ty = factor * tx + slope * x_hat + offset.

    Slope and offset have the size of the statistics and parameters together, so the transpose
    takes the sums over positions of g x_hat and of g once, for both.
    """
    statistic = lambda a: spec.layout.broadcast_statistics(spec.prepare(a))
    param = lambda a: spec.prepare(spec.layout.broadcast(a))
    shapes = [statistic(stats.rstd).shape, *(param(a).shape for a in params if a is not None)]
    shape = jnp.broadcast_shapes(*shapes)
    together = lambda a: exact(a, shape) if exact else a
    factor = _factor(spec, stats, params)
    slope, offset = -(factor * together(statistic(q))), None
    if params.scale is not None:
        slope = together(param(tparams.scale)) + slope
    if t_mean is not None:
        offset = -(factor * together(statistic(t_mean)))
    if params.bias is not None:
        t_bias = together(param(tparams.bias))
        offset = t_bias if offset is None else t_bias + offset
    if exact and stats.mean_low is not None and shape != x.shape:
        # Subtracted from each x_hat, the mean's low part would be rounded away where |x_hat| >= 1,
        # always in the same direction; so it is part of the offset. Without `exact` this would be
        # one more kernel.
        low = statistic(stats.mean_low * stats.rstd.astype(stats.mean_low.dtype))
        offset, stats = offset - slope * low, stats._replace(mean_low=None)
    to_x = lambda a: exact(a, x.shape) if exact else spec.layout.repeat(a, x)
    rest = to_x(slope) * compute_x_hat(spec, x, stats)
    return rest if offset is None else rest + to_x(offset)


def _factor(spec, stats, params):
    factor = spec.layout.broadcast_statistics(spec.prepare(stats.rstd))
    return factor if params.scale is None else factor * effective_scale(spec, params.scale)
