"""Root-mean-square normalization: layer norm that does not subtract the mean."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.axes import Axes
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.over_axes import norm_over_axes


def rms_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    scale_offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Apply RMS normalization: a mean square of one over `axis`, for each example.

        y = x / sqrt(mean(x**2) + epsilon) * (scale_offset + scale) + bias

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      params: scale and bias, each of the shape of x along `axis` (in the order of x), or of the
        rank of x with each axis of size 1 or as in x (one for each example, say), or None.
      axis: the axis or axes that share statistics.
      epsilon: added to the mean square; in units of x squared.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is
        divided. Where nothing counts, the result is the bias.
      scale_offset: added to the scale, in float32 or better. With 1, a scale of zeros changes
        nothing.
      implementation: "kernel" for the platform's kernel, "xla" for XLA. None: the environment
        variable JAXNORM_IMPLEMENTATION if set, else the kernel if it supports the input, else XLA.
        See `implementations`.

    Returns:
      An array of the shape and dtype of x. Statistics are computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, `where` is not boolean, or params is not a NormParams.
      ValueError: an axis is out of range or given twice, a shape does not fit, x is a scalar,
        epsilon is negative, there is an offset and no scale, or
        `implementation="kernel"` can't run.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.rms_norm(jnp.array([[0.0, 0.0, 0.0, 4.0]])).round(4)
      Array([[0., 0., 0., 2.]], dtype=float32)

    References:
      Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    return norm_over_axes(
        "rms_norm",
        x,
        params,
        axis,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        subtract_mean=False,
        implementation=implementation,
    )
