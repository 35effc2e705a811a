"""Group normalization: statistics of each example and group of features."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.layouts import group_layout
from jaxnorm.core.norm import norm, prepare_call
from jaxnorm.core.standardize import NormParams


def group_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    *,
    num_groups: int = 32,
    feature_axis: int = -1,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
    scale_offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Apply group normalization: zero mean and unit variance in each example and group of features.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * (scale_offset + scale) + bias

    Statistics are shared over all axes but the first, which holds the examples, and over the
    features of one group: `num_groups` equal runs of neighbouring features.

    Args:
      x: array of shape (batch, ..., features), or with the features at `feature_axis`, or of
        shape (features,) for a single example; floating-point or complex.
      params: scale and bias, each of shape (features,), or of the rank of x with each axis of size
        1 or as in x (one for each example, say), or None.
      num_groups: how many groups; it must divide the number of features. One group shares
        statistics over the whole example.
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
      ValueError: the groups do not divide the features, the feature axis is the first or out of
        range, a shape does not fit, epsilon is negative, there is an offset and no scale, or
        `implementation="kernel"` can't run.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2).round(4)
      Array([[-1.,  1., -1.,  1.]], dtype=float32)

    References:
      Wu and He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    x = check_input(x)
    spec, arrays = prepare_call(
        "group_norm",
        x,
        group_layout(x.shape, num_groups, feature_axis, arguments=("feature_axis",)),
        params,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        implementation=implementation,
    )
    return norm(spec, arrays)
