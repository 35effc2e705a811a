"""Root-mean-square normalization of a residual sum."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.axes import Axes
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.over_axes import norm_of_sum_over_axes


def add_rms_norm(
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
    """Apply RMS normalization to x + residual, and return this sum too.

        residual_sum = x + residual
        y = residual_sum / sqrt(mean(residual_sum**2) + epsilon) * (scale_offset + scale) + bias

    The sum is taken in float32 or better, and is normalized before it is rounded. The backward pass
    keeps the residual sum, not x and the residual: in half precision its standardized elements are
    those of the residual sum as it was rounded, by the mean square of the sum before.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      residual: array of the shape and dtype of x, such as the stream of a transformer.
      params: scale and bias, each of the shape of x along `axis` (in the order of x), or of the
        rank of x with each axis of size 1 or as in x (one for each example, say), or None.
      axis: the axis or axes that share statistics.
      epsilon: added to the mean square; in units of x squared.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is added and
        divided. Where nothing counts, y is the bias.
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
      >>> x = jnp.array([[0.0, 0.0, 0.0, 3.0]])
      >>> y, residual_sum = jn.add_rms_norm(x, jnp.array([[0.0, 0.0, 0.0, 1.0]]))
      >>> y.round(4), residual_sum
      (Array([[0., 0., 0., 2.]], dtype=float32), Array([[0., 0., 0., 4.]], dtype=float32))

    References:
      Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return norm_of_sum_over_axes(
        "add_rms_norm",
        x,
        residual,
        params,
        axis,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        subtract_mean=False,
        implementation=implementation,
    )
