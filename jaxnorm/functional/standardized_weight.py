"""Weight standardization: the weights of each feature have mean zero and one variance."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_feature_array, check_input
from jaxnorm.core.arithmetic import reciprocal_std
from jaxnorm.core.axes import Axes
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.norm import norm, prepare_call, program
from jaxnorm.core.standardize import NormParams, standardize_by
from jaxnorm.core.statistics import statistics


def standardize_weight(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-6,
    fan_in: bool = False,
) -> jax.Array:
    """Standardize weights: zero mean and unit variance for the weights of each feature.

        y = (w - mean(w)) / sqrt(var(w) + epsilon) * gain
        y = (w - mean(w)) / sqrt(max(var(w) n, epsilon)) * gain    with fan_in

    Mean and variance are those over all axes but the features', whose n elements are the fan-in:
    with it, features of independent inputs of variance one have variance one.

    Args:
      w: weights such as a kernel of shape (height, width, inputs, features); floating-point or
        complex.
      gain: the scale, of the shape of the features, or None.
      feature_axis: the axis of the features, or several; () for all weights at once.
      epsilon: added to the variance, or the least value of n times the variance; in units of w
        squared.
      fan_in: whether the variance is multiplied by n, as in normalizer-free networks. Their
        epsilon is 1e-4.

    Returns:
      An array of the shape and dtype of w. Statistics are computed in float32 or better.

    Raises:
      TypeError: w is of an integer type, or gain is complex and w is not.
      ValueError: an axis is out of range or given twice, gain does not fit, w is a scalar, or
        epsilon is negative.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> w = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> jn.standardize_weight(w).round(4)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> jn.standardize_weight(w, fan_in=True).round(4)
      Array([[-0.7071, -0.7071],
             [ 0.7071,  0.7071]], dtype=float32)

    References:
      Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel Normalization and
      Weight Standardization", 2019, arXiv:1903.10520.
      Brock, De, Smith and Simonyan, "High-Performance Large-Scale Image Recognition Without
      Normalization", 2021, arXiv:2102.06171 (fan_in).
    """
    w = check_input(w, "w")
    layout = batch_layout(w.shape, feature_axis)
    if gain is not None:
        gain = check_feature_array(gain, "gain", layout, w.dtype)
    spec, arrays = prepare_call(
        "standardize_weight",
        w,
        layout,
        NormParams(scale=gain),
        epsilon=epsilon,
        implementation="xla" if fan_in else None,
    )
    return (_by_fan_in if fan_in else norm)(spec, arrays)


@program
def _by_fan_in(spec, arrays):
    """Divide by the root of the sum of squares instead of the standard deviation."""
    with jax.named_scope(spec.name):
        measured = statistics(spec._replace(epsilon=0.0), arrays.x)
        power = jnp.maximum(measured.var * measured.count, spec.epsilon)
        rstd = reciprocal_std(power, 0.0)
        return standardize_by(
            spec, arrays.x, measured.mean_high, measured.mean_low, rstd, arrays.params
        )
