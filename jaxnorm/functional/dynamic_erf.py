"""Dynamic erf: a bounded function of each element instead of a norm."""

import jax
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.bounded import bound
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.standardize import NormParams


def dynamic_erf(
    x: ArrayLike,
    alpha: ArrayLike,
    shift: ArrayLike,
    params: NormParams | None = None,
    *,
    feature_axis: int = -1,
) -> jax.Array:
    """Apply dynamic erf (Derf), which replaces layer norm and has no statistics.

        y = erf(alpha * x + shift) * scale + bias

    Args:
      x: array of any shape with at least one axis; floating-point.
      alpha: the factor of x, learned; a number, or an array of shape (features,). The paper starts
        with 0.5.
      shift: added before the error function, learned; a number, or an array of shape (features,).
        The paper starts with 0.
      params: scale and bias of shape (features,), or None.
      feature_axis: the axis of the features.

    Returns:
      An array of the shape and dtype of x. The arithmetic is in float32 or better.

    Raises:
      TypeError: x is of an integer type or complex, alpha or shift is complex, or params is not a
        NormParams.
      ValueError: the axis is out of range, a shape does not fit, or x is a scalar.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.dynamic_erf(jnp.array([-100.0, 0.0, 100.0]), alpha=0.5, shift=0.0).round(4)
      Array([-1.,  0.,  1.], dtype=float32)

    References:
      Chen, Lu, Zhu, Sun and Liu, "Stronger Normalization-Free Transformers", 2025,
      arXiv:2512.10938.
    """
    x = check_input(x)
    layout = batch_layout(x.shape, feature_axis)
    return bound("dynamic_erf", lax.erf, x, layout, alpha, shift, params)
