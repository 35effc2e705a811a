"""Dynamic tanh: a bounded function of each element instead of a norm."""

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.arithmetic import tanh
from jaxnorm.core.bounded import bound
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.standardize import NormParams


def dynamic_tanh(
    x: ArrayLike,
    alpha: ArrayLike,
    params: NormParams | None = None,
    *,
    feature_axis: int = -1,
) -> jax.Array:
    """Apply dynamic tanh (DyT), which replaces layer norm and has no statistics.

        y = tanh(alpha * x) * scale + bias

    The derivative is as accurate where tanh is nearly one as elsewhere.

    Args:
      x: array of any shape with at least one axis; floating-point.
      alpha: the factor of x, learned; a number, or an array of shape (features,). The paper starts
        with 0.5.
      params: scale and bias of shape (features,), or None.
      feature_axis: the axis of the features.

    Returns:
      An array of the shape and dtype of x. The arithmetic is in float32 or better.

    Raises:
      TypeError: x is of an integer type or complex, alpha is complex, or params is not a
        NormParams.
      ValueError: the axis is out of range, a shape does not fit, or x is a scalar.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.dynamic_tanh(jnp.array([-100.0, 0.0, 100.0]), alpha=0.5)
      Array([-1.,  0.,  1.], dtype=float32)

    References:
      Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization", 2025, arXiv:2503.10622.
    """
    x = check_input(x)
    layout = batch_layout(x.shape, feature_axis)
    return bound("dynamic_tanh", tanh, x, layout, alpha, None, params)
