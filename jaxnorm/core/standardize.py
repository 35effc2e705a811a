"""The equation of every norm: y = (x - mean) * rstd * (scale_offset + scale) + bias.

The derivative of the statistics is defined in moments.py; JAX differentiates the rest. This file
only says what to keep for the backward pass: x in its own dtype and the statistics, never the
standardized x, which is computed again.

With a residual, x is the sum. y and the statistics are those of the sum before it is rounded; the
derivative standardizes the total, which is kept instead of its summands.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.typing import DTypeLike

from jaxnorm.core.arithmetic import reciprocal_or_zero
from jaxnorm.core.moments import (
    Kept,
    Statistics,
    averages,
    computed_again,
    fits,
    less_mean,
    measured,
    standardized,
    tangents_of,
)
from jaxnorm.core.spec import NormSpec
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
    """Initial parameters, which change nothing: scale one, bias zero.

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
    """The equation, in the arithmetic's dtype.

    Where JAX differentiates it, `fit` is `expand`: the gradients are sums.
    """
    spread, prepare = spec.layout.spread, spec.prepare
    factor, offset = spread(prepare(rstd)), None
    if params.scale is not None:
        factor = factor * whole_scale(spec, params.scale)
    if params.bias is not None:
        offset = prepare(spec.layout.broadcast(params.bias))
    if mean_low is not None and x.dtype.itemsize == 2:
        # x - high is nearly exact, so the low part may come last, with the bias. For batch norm
        # this is one operation less for each element; with more, a TPU's compiler does not repeat
        # them in each matmul that needs y, and writes y out.
        low = spread(mean_low) * factor
        offset, mean_low = (-low if offset is None else offset - low), None
    y = less_mean(spec, x, mean_high, mean_low, fit) * fit(factor, x)
    return (y if offset is None else y + fit(offset, x)).astype(spec.dtype)


def whole_scale(spec: NormSpec, scale: jax.Array) -> jax.Array:
    """The factor of h. The offset is added here because in bfloat16 1 + 0.00390625 is 1."""
    scale = spec.prepare(spec.layout.broadcast(scale))
    return scale + spec.scale_offset if spec.scale_offset else scale


def affine(spec: NormSpec, h: jax.Array, params: NormParams) -> jax.Array:
    """Scale and bias of what is standardized, or stands in its place."""
    if params.scale is not None:
        h = h * expand(whole_scale(spec, params.scale), h)
    if params.bias is not None:
        h = h + expand(spec.prepare(spec.layout.broadcast(params.bias)), h)
    return h.astype(spec.dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def undo_standardize(
    spec: NormSpec, y: jax.Array, mean: jax.Array, rstd: jax.Array, params: NormParams
) -> jax.Array:
    """The equation solved for x."""
    x = spec.prepare(y)
    if params.bias is not None:
        x = x - expand(spec.prepare(spec.layout.broadcast(params.bias)), x)
    if params.scale is not None:
        x = x / expand(whole_scale(spec, params.scale), x)
    std = spec.prepare(reciprocal_or_zero(rstd))
    return (x * expand(std, x) + expand(mean, x)).astype(spec.dtype)


# With statistics that are given. The backward pass computes again what this computes.
standardize_by = jax.checkpoint(functools.partial(standardize, fit=expand), static_argnums=0)


def measure_and_standardize(
    spec: NormSpec,
    x: jax.Array,
    residual: jax.Array | None,
    params: NormParams,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """y, the statistics of x, and the total if there is a residual: the formula of every norm."""
    return _norm(spec, x, residual, params, where, spec.statistics_devices.group())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(spec, x, residual, params, where, group):
    total = None
    if residual is not None:
        # Or XLA lets the matmul that makes x write it in float32, as the sum reads it.
        x, residual = lax.optimization_barrier((x, residual))
        exact = spec.prepare(x) + spec.prepare(residual)
        x, total = exact, exact.astype(x.dtype)
    stats = measured(spec, x, where, group)
    y = standardize(spec, x, stats.mean_high, stats.mean_low, stats.rstd, params)
    return y, stats, total


@_norm.defjvp
def _norm_jvp(spec, primals, tangents):
    x, residual, params, where, group = primals
    tx, tresidual, tparams, *_ = tangents
    y, stats, total = _norm(spec._replace(differentiated=True), *primals)
    if residual is not None:
        x, tx = total, tx + tresidual
    kept = Kept(x, where, group, stats, params)
    return (y, stats, total), norm_tangents(spec, kept, tx, tparams)


def standardize_measured(
    spec: NormSpec,
    x: jax.Array,
    stats: Statistics,
    params: NormParams,
    where: jax.Array | None = None,
) -> tuple[jax.Array, Statistics]:
    """y by statistics that have been measured of this x, and these with their derivative.

    The derivative is that of `measure_and_standardize`. In between, the parameters may be chosen
    by the statistics.
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
    ty, tstats, _ = norm_tangents(spec, Kept(x, where, group, stats, params), tx, tparams)
    return (y, stats), (ty, tstats)


def norm_tangents(
    spec: NormSpec, kept: Kept, tx: jax.Array, tparams: NormParams
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """The tangents of y, of the statistics, and of the total if there is a residual."""
    total = None
    if spec.adds:
        # Cast once, so that the transpose adds the cotangents of y and of the total, then rounds.
        tx = spec.prepare(tx)
        total = tx.astype(kept.x.dtype)
    tangent = functools.partial(_tangents, spec)
    ty, *moved = computed_again(spec, tangent, kept, (tx, tparams))
    return ty, tangents_of(kept.stats, *moved), total


def _tangents(spec, kept, tangents):
    tx, tparams = tangents
    x, stats, params = kept.x, kept.stats, kept.params
    t_mean, q = averages(spec, kept, tx)
    rest = with_exact_sums(functools.partial(_rest, spec), x, stats, params, tparams, t_mean, q)
    return (_factor(spec, stats, params) * spec.prepare(tx) + rest).astype(spec.dtype), t_mean, q


def _rest(spec, exact, x, stats, params, tparams, t_mean, q):
    """ty = factor * tx + slope * h + offset; the last two summands.

    Slope and offset have the size of the statistics and parameters together, so the transpose
    takes the sums over positions of g h and of g once, for both.
    """
    statistic = lambda a: spec.layout.spread(spec.prepare(a))
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
        # Subtracted from each h, the mean's low part would be rounded away where |h| >= 1, always
        # the same way; so it is part of the offset. Elsewhere this would be one more kernel.
        low = statistic(stats.mean_low * stats.rstd.astype(stats.mean_low.dtype))
        offset, stats = offset - slope * low, stats._replace(mean_low=None)
    to_x = lambda a: exact(a, x.shape) if exact else spec.layout.repeat(a, x)
    rest = to_x(slope) * standardized(spec, x, stats)
    return rest if offset is None else rest + to_x(offset)


def _factor(spec, stats, params):
    factor = spec.layout.spread(spec.prepare(stats.rstd))
    return factor if params.scale is None else factor * whole_scale(spec, params.scale)
