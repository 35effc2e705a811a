"""Normalization by statistics that are given, and its inverse."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.axes import Axes
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.moments import Moments
from jaxnorm.core.norm import inverse_norm, norm, prepare_call
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.moments import check_moments
from jaxnorm.functional.state import BatchNormState


def normalize(
    x: ArrayLike,
    moments: Moments | BatchNormState,
    params: NormParams | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
) -> jax.Array:
    """Standardize x by given moments, for example of a data set.

        y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias

    `denormalize` undoes it. Gradients flow to the moments too; `jax.lax.stop_gradient` stops them.
    The mean is one number in its dtype: to standardize x by its own moments, a norm is more exact
    where the mean is much larger than the deviations.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      moments: mean and variance, each of shape (features,), or of the rank of x with each axis of
        size 1 or as in x; also those of a BatchNormState. The count is not used, and may be None.
      params: scale and bias of such shapes, or None.
      feature_axis: the axis of the features, or several; shape (features,) is then that of x along
        them, in the order of x.
      epsilon: added to the variance; in units of x squared.
      scale_offset: added to the scale, in float32 or better.

    Returns:
      An array of the shape and dtype of x, computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, moments is not a Moments, or params is not a NormParams.
      ValueError: an axis is out of range or given twice, a shape does not fit, x is a scalar,
        epsilon is negative, or there is an offset and no scale.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> data = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> jn.normalize(jnp.array([[2.0, 40.0]]), jn.moments(data, axis=0)).round(4)
      Array([[0., 2.]], dtype=float32)

    References:
      LeCun, Bottou, Orr and Müller, "Efficient BackProp", 1998 (the inputs of a network).
      Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against
      Distribution Shift", 2022 (the inputs, and the inverse for the outputs).
    """
    options = {"epsilon": epsilon, "scale_offset": scale_offset}
    return norm(*_prepare("normalize", x, moments, params, feature_axis, **options))


def denormalize(
    y: ArrayLike,
    moments: Moments | BatchNormState,
    params: NormParams | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
) -> jax.Array:
    """Undo `normalize` with the same arguments.

        x = (y - bias) / (scale_offset + scale) * sqrt(var + epsilon) + mean

    A scale of zero can't be undone: the result is then infinite or NaN.

    Args:
      y: array of any shape with at least one axis; floating-point or complex.
      moments: as in `normalize`.
      params: as in `normalize`.
      feature_axis: as in `normalize`.
      epsilon: added to the variance; in units of x squared.
      scale_offset: added to the scale, in float32 or better.

    Returns:
      An array of the shape and dtype of y, computed in float32 or better.

    Raises:
      TypeError: y is of an integer type, moments is not a Moments, or params is not a NormParams.
      ValueError: an axis is out of range or given twice, a shape does not fit, y is a scalar,
        epsilon is negative, or there is an offset and no scale.

    Examples:
      A forecast in the units of a time series that was normalized by itself (RevIN):

      >>> import jax, jax.numpy as jnp, jaxnorm as jn
      >>> series = jnp.array([[[1.0], [2.0], [3.0]]])  # batch, time, features
      >>> own = jax.tree.map(lambda a: jnp.expand_dims(a, 1), jn.moments(series, axis=1))
      >>> forecast = jn.normalize(series, own)[:, -1:] + 1.0  # a model's, say
      >>> jn.denormalize(forecast, own).round(1)
      Array([[[3.8]]], dtype=float32)

    References:
      Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against
      Distribution Shift", 2022.
    """
    options = {"epsilon": epsilon, "scale_offset": scale_offset}
    return inverse_norm(*_prepare("denormalize", y, moments, params, feature_axis, **options))


def _prepare(name, x, moments, params, feature_axis, **options):
    x = check_input(x)
    layout = batch_layout(x.shape, feature_axis)
    if isinstance(moments, Moments | BatchNormState):
        moments = Moments(moments.mean, moments.var, jnp.zeros(()))
    return prepare_call(name, x, layout, params, moments=check_moments(moments)[:2], **options)
