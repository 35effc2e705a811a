"""Instance normalization: statistics of each example and feature."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.layouts import instance_layout
from jaxnorm.core.norm import norm, prepare_call
from jaxnorm.core.standardize import NormParams


def instance_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    *,
    feature_axis: int = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    scale_offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Apply instance normalization: zero mean and unit variance in each example and feature.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * (scale_offset + scale) + bias

    Statistics are shared over all axes but the first, which holds the examples, and the feature
    axis: in an image, over its height and width.

    Args:
      x: array of shape (batch, ..., features), or with the features at `feature_axis`, and at least
        one axis more; floating-point or complex.
      params: scale and bias, each of shape (features,), or of the rank of x with each axis of size
        1 or as in x (one for each example, say), or None.
      feature_axis: the axis of the features; any but the first.
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
      ValueError: x has no axis besides examples and features, the feature axis is the first or out
        of range, a shape does not fit, epsilon is negative, there is an offset and no scale, or
        `implementation="kernel"` can't run.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.instance_norm(jnp.array([[[1.0, 10.0], [3.0, 30.0]]])).round(4)
      Array([[[-1., -1.],
              [ 1.,  1.]]], dtype=float32)

    References:
      Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
      Stylization", 2016, arXiv:1607.08022.
    """
    x = check_input(x)
    layout = instance_layout(x.shape, feature_axis)
    if not layout.reduction_axes:
        raise ValueError(
            "x must have an axis besides those of the examples and the features, got shape "
            f"{x.shape}, where each element would have its own mean; for statistics over the "
            "features, call layer_norm."
        )
    spec, arrays = prepare_call(
        "instance_norm",
        x,
        layout,
        params,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        implementation=implementation,
    )
    return norm(spec, arrays)
