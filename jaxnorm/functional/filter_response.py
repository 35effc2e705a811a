"""Filter response normalization: the mean square of each example and feature, and a threshold."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_real, check_scalar_or_features
from jaxnorm.core.layouts import instance_layout
from jaxnorm.core.norm import norm, prepare_call, program
from jaxnorm.core.standardize import NormParams, standardize
from jaxnorm.core.statistics import statistics
from jaxnorm.core.sums import expand


def filter_response_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    threshold: ArrayLike | None = None,
    *,
    feature_axis: int = -1,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Apply filter response normalization (FRN) and a thresholded linear unit (TLU).

        y = max(x / sqrt(mean(x**2) + epsilon) * scale + bias, threshold)

    The mean is over all axes but the first, which holds the examples, and the feature axis: in an
    image, over its height and width. The threshold takes the place of an activation function.

    Args:
      x: array of shape (batch, ..., features), or with the features at `feature_axis`, whose
        squares fit into the arithmetic's dtype (in float32, up to about 1e19);
        floating-point, or complex if there is no threshold.
      params: scale and bias of shape (features,), or None.
      threshold: the smallest result, learned; an array of shape (features,), a number, or None for
        no threshold. Where the result and the threshold are equal, each gets half of the gradient.
        The paper starts with 0.
      feature_axis: the axis of the features; any but the first.
      epsilon: added to the mean square; in units of x squared. With a single position, as after
        global pooling, 1e-6 makes the result a sign; the paper learns a larger one there.

    Returns:
      An array of the shape and dtype of x. Statistics are computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, x is complex and there is a threshold, or params is not a
        NormParams.
      ValueError: the feature axis is the first or out of range, a shape does not fit, or epsilon
        is negative.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> x = jnp.array([[[1.0, -1.0], [7.0, 1.0]]])
      >>> jn.filter_response_norm(x, threshold=0.0).round(1)
      Array([[[0.2, 0. ],
              [1.4, 1. ]]], dtype=float32)

    References:
      Singh and Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the
      Training of Deep Neural Networks", 2019, arXiv:1911.09737.
    """
    x = check_input(x)
    layout = instance_layout(x.shape, feature_axis)
    spec, arrays = prepare_call(
        "filter_response_norm", x, layout, params, epsilon=epsilon, subtract_mean=False
    )
    if threshold is None:
        return norm(spec, arrays)
    check_real(x, "a threshold")
    return _above(
        spec, x, arrays.params, check_scalar_or_features(threshold, "threshold", layout, x.dtype)
    )


@program
def _above(spec, x, params, threshold):
    with jax.named_scope(spec.name):
        return _standardize_above(spec, x, statistics(spec, x).rstd, params, threshold)


# The backward pass recomputes the maximum too: the mask of its larger operand is as large as x.
@functools.partial(jax.checkpoint, static_argnums=0)
def _standardize_above(spec, x, rstd, params, threshold):
    wide = spec._replace(dtype=spec.compute_dtype)
    y = standardize(wide, x, None, None, rstd, params, expand)
    threshold = spec.layout.broadcast(threshold) if threshold.ndim else threshold
    return jnp.maximum(y, expand(spec.prepare(threshold), x)).astype(spec.dtype)
