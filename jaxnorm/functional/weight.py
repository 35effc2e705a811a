"""Weight normalization: the length of each feature's weights is a parameter of its own."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_epsilon, check_feature_array, check_input
from jaxnorm.core.arithmetic import promote
from jaxnorm.core.axes import Axes
from jaxnorm.core.exporting import jit
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.lengths import two_norm, unit
from jaxnorm.core.sums import expand

EPSILON = 1e-12


def weight_norm(
    v: ArrayLike, g: ArrayLike, *, feature_axis: Axes = -1, epsilon: float = EPSILON
) -> jax.Array:
    """Apply weight normalization: the direction of v with length g, for each feature.

        w = g v / sqrt(|v|**2 + epsilon)

    |v| is the 2-norm over all axes but the features'. It is right for weights of any magnitude.

    Args:
      v: weights such as a kernel of shape (inputs, features); floating-point or complex.
      g: the lengths, of the shape of the features; in the units of w.
      feature_axis: the axis of the features, or several; () for one norm of all weights.
      epsilon: added to the square of the norm; in units of v squared. Where it is 0, v of zeros
        gives zeros and a gradient of zero.

    Returns:
      w, of the shape and dtype of v. The arithmetic is in float32 or better.

    Raises:
      TypeError: v is of an integer type, or g is complex and v is not.
      ValueError: an axis is out of range or given twice, g does not fit, v is a scalar, or epsilon
        is negative.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.weight_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]), jnp.array([5.0, 1.0])).round(4)
      Array([[3., 0.],
             [4., 1.]], dtype=float32)

    References:
      Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training
      of Deep Neural Networks", 2016, arXiv:1602.07868.
    """
    v = check_input(v, "v")
    layout = batch_layout(v.shape, feature_axis)
    g = check_feature_array(g, "g", layout, v.dtype)
    return _weight_norm(layout, check_epsilon(epsilon), v, g)


@functools.partial(jit, static_argnums=(0, 1))
def _weight_norm(layout, epsilon, v, g):
    with jax.named_scope("weight_norm"):
        direction = unit(v, layout.reduction_axes, epsilon)
        lengths = layout.broadcast(g)
        dtype = promote(direction.dtype, lengths.dtype)
        return (direction.astype(dtype) * expand(lengths.astype(dtype), v)).astype(v.dtype)


def init_weight_norm(w: ArrayLike, *, feature_axis: Axes = -1) -> tuple[jax.Array, jax.Array]:
    """Return v and g for which `weight_norm` gives these weights.

        v = w,    g = sqrt(|w|**2 + 1e-12)

    Args:
      w: weights such as a kernel of shape (inputs, features); floating-point or complex.
      feature_axis: the axis of the features, or several; () for one norm of all weights.

    Returns:
      v, which is w, and g of the shape of the features, real, in float32 or better.

    Raises:
      TypeError: w is of an integer type.
      ValueError: an axis is out of range or given twice, or w is a scalar.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> v, g = jn.init_weight_norm(jnp.array([[3.0, 0.0], [4.0, 2.0]]))
      >>> g
      Array([5., 2.], dtype=float32)
    """
    w = check_input(w, "w")
    layout = batch_layout(w.shape, feature_axis)
    # g includes the default epsilon of `weight_norm`; otherwise small weights would shrink.
    length = jnp.squeeze(two_norm(w, layout.reduction_axes), layout.reduction_axes)
    return w, jnp.hypot(length, jnp.full_like(length, math.sqrt(EPSILON)))
