"""The equation of every norm: y = (x - mean) * rstd * scale + bias.

The derivative of the statistics is defined in moments.py; JAX differentiates the rest. This file
only says what to keep for the backward pass: x in its own dtype and the statistics, never the
standardized x, which is computed again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import DTypeLike

from jaxnorm.core.moments import Statistics, statistics, subtract
from jaxnorm.core.spec import NormSpec


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


@functools.partial(jax.checkpoint, static_argnums=0)
def standardize(
    spec: NormSpec,
    x: jax.Array,
    mean_high: jax.Array | None,
    mean_low: jax.Array | None,
    rstd: jax.Array,
    params: NormParams,
) -> jax.Array:
    """The equation, in the arithmetic's dtype; the result is of the shape of x."""
    y = subtract(spec.prepare(x), mean_high, mean_low) * rstd.astype(spec.compute_dtype)
    if params.scale is not None:
        y = y * spec.layout.broadcast(params.scale).astype(spec.compute_dtype)
    if params.bias is not None:
        y = y + spec.layout.broadcast(params.bias).astype(spec.compute_dtype)
    return y.reshape(spec.layout.shape).astype(spec.dtype)


def measure_and_standardize(
    spec: NormSpec, x: jax.Array, params: NormParams, where: jax.Array | None = None
) -> tuple[jax.Array, Statistics]:
    """y, and the statistics of x: the formula of every norm."""
    stats = statistics(spec, x, where)
    return standardize(spec, x, stats.mean_high, stats.mean_low, stats.rstd, params), stats
