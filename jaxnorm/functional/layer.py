"""Layer normalization: statistics over the given axes of each example."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.axes import Axes
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.over_axes import norm_over_axes


def layer_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    scale_offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Apply layer normalization: zero mean and unit variance over `axis`, for each example.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * (scale_offset + scale) + bias

    It normalizes activations, not weights and biases, and does not depend on other examples.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      params: scale and bias, each of the shape of x along `axis` (in the order of x), or of the
        rank of x with each axis of size 1 or as in x (one for each example, say), or None.
      axis: the axis or axes that share statistics.
      epsilon: added to the variance; in units of x squared.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is
        standardized. Where nothing counts, the result is the bias.
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
      >>> jn.layer_norm(jnp.array([[2.0, 4.0, 6.0, 8.0, 10.0]])).round(4)
      Array([[-1.4142, -0.7071,  0.    ,  0.7071,  1.4142]], dtype=float32)
      >>> images = jnp.ones((8, 32, 32, 3))
      >>> jn.layer_norm(images, jn.init_params((32, 32, 3)), axis=(1, 2, 3)).shape
      (8, 32, 32, 3)

    References:
      Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    return norm_over_axes(
        "layer_norm",
        x,
        params,
        axis,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        implementation=implementation,
    )
