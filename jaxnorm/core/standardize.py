"""The equation of every norm: y = (x - mean) * rstd * scale + bias.

With the derivative of the statistics defined (moments.py), JAX differentiates it from here. The
only thing said about that is what to keep for the backward pass: x in its own dtype and the
statistics, never the standardized x, which is computed again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnorm.core.moments import Measure, centre


class NormParams(NamedTuple):
    """The affine of a norm: y = standardized x * scale + bias, each of them optional.

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
    """Parameters that leave the standardized x as it is: scale one, bias zero.

    Args:
      features: the number of features, or the shape of the axes that are normalized.
      scale: whether there is a scale.
      bias: whether there is a bias.
      dtype: of both.

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


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def standardize(
    how: Measure,
    dtype: jnp.dtype,
    x: jax.Array,
    mean: jax.Array | None,
    rest: jax.Array | None,
    rstd: jax.Array,
    params: NormParams,
) -> jax.Array:
    """The equation; in the arithmetic of `how`, the result of `dtype`."""
    y = centre(how.prepare(x), mean, rest) * rstd.astype(how.dtype)
    if params.scale is not None:
        y = y * how.layout.spread(params.scale).astype(how.dtype)
    if params.bias is not None:
        y = y + how.layout.spread(params.bias).astype(how.dtype)
    return y.reshape(how.layout.shape).astype(dtype)
