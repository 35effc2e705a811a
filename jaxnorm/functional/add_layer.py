"""Layer normalization of a residual sum."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.axes import Axes
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.over_axes import norm_of_sum_over_axes


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    params: NormParams | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    scale_offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Apply layer normalization to x + residual, and return this sum too.

        residual_sum = x + residual
        y = (residual_sum - mean(residual_sum)) / sqrt(var(residual_sum) + epsilon) * (scale_offset
        + scale) + bias

    The sum is taken in float32 or better, and is normalized before it is rounded. The backward pass
    keeps the residual sum, not x and the residual: in half precision its standardized elements are
    those of the residual sum as it was rounded, by the mean and variance of the sum before.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      residual: array of the shape and dtype of x, such as the stream of a transformer.
      params: scale and bias, each of the shape of x along `axis` (in the order of x), or of the
        rank of x with each axis of size 1 or as in x (one for each example, say), or None.
      axis: the axis or axes that share statistics.
      epsilon: added to the variance; in units of x squared.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is added and
        standardized. Where nothing counts, y is the bias.
      scale_offset: added to the scale, in float32 or better. With 1, a scale of zeros changes
        nothing.
      implementation: "kernel" for the platform's kernel, "xla" for XLA. None: the environment
        variable JAXNORM_IMPLEMENTATION if set, else the kernel if it supports the input, else XLA.
        See `implementations`.

    Returns:
      y and the residual sum, of the shape and dtype of x. Statistics are computed in float32 or
      better.

    Raises:
      TypeError: x is of an integer type, the residual of another type than x, `where` is not
        boolean, or params is not a NormParams.
      ValueError: an axis is out of range or given twice, a shape does not fit, x is a scalar,
        epsilon is negative, there is an offset and no scale, or
        `implementation="kernel"` can't run.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> stream = jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
      >>> y, stream = jn.add_layer_norm(jnp.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), stream)
      >>> y.round(4)
      Array([[-1.4142, -0.7071,  0.    ,  0.7071,  1.4142]], dtype=float32)
      >>> stream
      Array([[ 2.,  4.,  6.,  8., 10.]], dtype=float32)

    References:
      Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
      Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
      arXiv:2002.04745 (where the residual is added before or after the norm).
    """
    return norm_of_sum_over_axes(
        "add_layer_norm",
        x,
        residual,
        params,
        axis,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        implementation=implementation,
    )
