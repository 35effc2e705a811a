"""Global response normalization: features compete by their lengths over an image."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_params
from jaxnorm.core.arithmetic import quotient
from jaxnorm.core.layouts import instance_layout
from jaxnorm.core.lengths import two_norm
from jaxnorm.core.norm import make_spec, program
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams, standardize
from jaxnorm.core.sums import expand


def global_response_norm(
    x: ArrayLike,
    params: NormParams | None = None,
    *,
    feature_axis: int = -1,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Apply global response normalization (GRN): multiply features by their share of the response.

        y = x + x * N * scale + bias,    N = G / (mean of G over the features + epsilon)

    G is the 2-norm of each example and feature over the positions, all axes but the first, which
    holds the examples, and the feature axis: in an image, over its height and width.

    Args:
      x: array of shape (batch, ..., features), or with the features at `feature_axis`;
        floating-point or complex.
      params: scale and bias of shape (features,), or None, a scale of one and a bias of zero. The
        paper starts with a scale of zero, so that y is x.
      feature_axis: the axis of the features; any but the first.
      epsilon: added to the mean of the norms; in units of x. If it is 0, N is 0 where x is.

    Returns:
      An array of the shape and dtype of x. Norms are computed in float32 or better, and their
      squares neither over- nor underflow.

    Raises:
      TypeError: x is of an integer type, or params is not a NormParams.
      ValueError: the feature axis is the first or out of range, a shape does not fit, or epsilon
        is negative.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.global_response_norm(jnp.array([[[3.0, 0.0], [4.0, 5.0]]])).round(4)
      Array([[[ 6.,  0.],
              [ 8., 10.]]], dtype=float32)

    References:
      Woo, Debnath, Hu, Chen, Liu, Kweon and Xie, "ConvNeXt V2: Co-designing and Scaling ConvNets
      with Masked Autoencoders", 2023, arXiv:2301.00808.
    """
    x = check_input(x)
    layout = instance_layout(x.shape, feature_axis)
    spec = make_spec("global_response_norm", x, layout, epsilon)
    return _global_response_norm(spec, x, check_params(params, layout, x.dtype))


@program
def _global_response_norm(spec, x, params):
    with jax.named_scope(spec.name):
        length = two_norm(x, spec.layout.reduction_axes)
        return _respond(spec, x, _share(spec, length), params)


def _share(spec: NormSpec, length: jax.Array) -> jax.Array:
    """Divide each feature's length by the mean length."""
    mean = jnp.mean(length, spec.layout.feature_axes, keepdims=True) + spec.epsilon
    zero = mean == 0
    return jnp.where(zero, 0, quotient(length, jnp.where(zero, 1, mean)))


@functools.partial(jax.checkpoint, static_argnums=0)
def _respond(spec: NormSpec, x: jax.Array, share: jax.Array, params: NormParams) -> jax.Array:
    wide = spec._replace(dtype=spec.compute_dtype)
    # The share takes the place of rstd.
    response = standardize(wide, x, None, None, share, params, expand)
    return (spec.prepare(x) + response).astype(spec.dtype)
