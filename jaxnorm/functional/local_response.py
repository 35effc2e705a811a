"""Local response normalization: each feature divided by a power of its neighbours' sum of squares.

With u a power of two near the largest of the neighbours and the root of k, and r**2 = alpha / size,

    x / (k + sum((r x)**2))**beta = x / u * (k / u**2 + sum((r x / u)**2))**-beta * u**(1 - 2 beta)

where no square over- or underflows.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_number
from jaxnorm.core.arithmetic import magnitude, square
from jaxnorm.core.axes import canonical_axes, check_integer
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.norm import make_spec, program
from jaxnorm.core.spec import NormSpec


class Response(NamedTuple):
    """The constants of the equation."""

    size: int
    alpha: float
    beta: float
    k: float


def local_response_norm(
    x: ArrayLike,
    *,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    feature_axis: int = -1,
) -> jax.Array:
    """Apply local response normalization (LRN): divide each feature by a power of its neighbours.

        y = x / (k + alpha / size * sum(x**2 over the neighbours))**beta

    The neighbours are `size` features around each one, itself included. Beyond the first and the
    last feature there are zeros. If the size is even, one more of them comes after than before, as
    in ONNX; PyTorch has one more before. The paper's alpha, like that of TensorFlow, is not divided
    by the size: it is `alpha / size` here.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      size: how many neighbours, a positive integer; (size - 1) // 2 come before.
      alpha: the weight of the mean square of the neighbours, at least 0; in units of 1 / x squared.
      beta: the exponent.
      k: added to the weighted mean square, at least 0. If it is 0, y is 0 where all neighbours are.
      feature_axis: the axis of the features.

    Returns:
      An array of the shape and dtype of x. The arithmetic is in float32 or better.

    Raises:
      TypeError: x is of an integer type, the size is not an integer, or alpha, beta or k is not a
        number.
      ValueError: the axis is out of range, x is a scalar, the size is not positive, alpha or k is
        negative or both are 0, or one of the numbers is not finite.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.local_response_norm(jnp.array([1.0, 0.0, 2.0, 0.0]), size=3, alpha=3.0, beta=1.0)
      Array([0.5, 0. , 0.4, 0. ], dtype=float32)

    References:
      Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
      Networks", NeurIPS 2012.
    """
    x = check_input(x)
    (feature_axis,) = canonical_axes((feature_axis,), x.ndim, "feature_axis")
    spec = make_spec("local_response_norm", x, batch_layout(x.shape, feature_axis))
    constants = Response(
        _check_size(size),
        _check_finite(alpha, "alpha", least=0),
        _check_finite(beta, "beta"),
        _check_finite(k, "k", least=0),
    )
    if not constants.alpha and not constants.k:
        raise ValueError(
            "alpha or k must be positive, got 0 for both; x would be divided by a power of zero."
        )
    return _local(spec, constants, x)


@functools.partial(program, static_argnums=(0, 1))
def _local(spec, constants, x):
    with jax.named_scope(spec.name):
        return _inhibited(spec, constants, x)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _inhibited(spec: NormSpec, constants: Response, x: jax.Array) -> jax.Array:
    (axis,), (size, alpha, beta, k) = spec.layout.feature_axes, constants
    x = spec.prepare(x)
    padding = [((size - 1) // 2, size // 2) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = jnp.pad(x, padding)
    shift = lambda start: lax.slice_in_dim(padded, start, start + x.shape[axis], axis=axis)
    neighbours = [shift(start) for start in range(size)]
    # Neither the result nor its derivative depends on the unit. The root of the weight is a part of
    # the unit, as a power of two.
    weight = alpha / size
    root = 2.0 ** math.floor(math.log2(weight) / 2) if weight else 0.0
    parts = [root * lax.stop_gradient(jnp.abs(a)) for a in neighbours]
    longest = functools.reduce(jnp.maximum, parts, jnp.full_like(parts[0], math.sqrt(k)))
    zero = longest == 0
    unit = jnp.where(zero, 1, magnitude(longest))
    squares = [square(a * (root / unit).astype(a.dtype)) for a in neighbours]
    total = functools.reduce(operator.add, squares) * (weight / root**2 if weight else 0.0)
    if k:  # for k = 0, XLA would divide zero by the square of the unit, which may be zero
        total = total + k / unit / unit
    total = jnp.where(zero, 1, total)
    factor = jnp.where(zero, 0, total**-beta * unit ** (1 - 2 * beta))
    return ((x * (1 / unit).astype(x.dtype)) * factor.astype(x.dtype)).astype(spec.dtype)


def _check_size(size: int) -> int:
    size = check_integer(size, "size")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}; it counts a feature itself too.")
    return size


def _check_finite(value: float, name: str, least: float = -math.inf) -> float:
    number = check_number(value, name)
    if not math.isfinite(number) or number < least:
        bound = "finite" if least < 0 else f"finite and at least {least}"
        raise ValueError(
            f"{name} must be {bound}, got {number}; the paper's is small and positive."
        )
    return number
