"""Unit norm: vectors of length one."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_number
from jaxnorm.core.arithmetic import absolute, quotient
from jaxnorm.core.axes import Axes
from jaxnorm.core.layouts import moments_layout
from jaxnorm.core.lengths import two_norm
from jaxnorm.core.norm import make_spec, program
from jaxnorm.core.spec import NormSpec


def unit_norm(
    x: ArrayLike,
    *,
    axis: Axes = -1,
    ord: float = 2,
    epsilon: float = 1e-12,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Apply unit norm: a length of one over `axis`.

        y = x / max(norm(x), epsilon)

    The norm is the root of the sum of squares (`ord` 2), the sum of the absolute values (1), or the
    largest of them (inf). Squares neither over- nor underflow. At zero, the norm has the derivative
    zero; if several elements are the largest, they share the derivative equally.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      axis: the axis or axes of the vectors.
      ord: which norm: 1, 2, or inf.
      epsilon: the smallest divisor; in units of x. If it is 0, a vector of zeros stays zero, and
        so is its gradient.
      where: boolean, broadcastable to x: True counts in the norm. Every position is divided. Where
        nothing counts, the result is zero.

    Returns:
      An array of the shape and dtype of x. The norm is computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, `where` is not boolean, or epsilon is not a
        number.
      ValueError: an axis is out of range or given twice, `where` does not broadcast, x is a
        scalar, `ord` is another number, or epsilon is negative.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> jn.unit_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]))
      Array([[0.6, 0.8],
             [0. , 0. ]], dtype=float32)
      >>> jn.unit_norm(jnp.array([1.0, -3.0]), ord=1)
      Array([ 0.25, -0.75], dtype=float32)

    References:
      Wang, Xiang, Cheng and Yuille, "NormFace: L2 Hypersphere Embedding for Face Verification",
      2017, arXiv:1704.06369.
    """
    x = check_input(x)
    layout = moments_layout(x.shape, axis)
    spec = make_spec("unit_norm", x, layout, epsilon)
    return _unit_norm(spec, _check_order(ord), x, layout.mask(where))


@functools.partial(program, static_argnums=(0, 1))
def _unit_norm(spec, order, x, where):
    with jax.named_scope(spec.name):
        return _divide(spec, x, where, _NORMS[order](spec, x, where))


@functools.partial(jax.checkpoint, static_argnums=0)
def _divide(spec: NormSpec, x: jax.Array, where: jax.Array | None, norm: jax.Array) -> jax.Array:
    divisor = jnp.maximum(norm, spec.epsilon)
    zero = divisor == 0
    if where is not None:
        counted = jnp.any(where, spec.layout.reduction_axes, keepdims=True)
        zero = zero | ~counted
    y = quotient(spec.prepare(x), jnp.where(zero, 1, divisor))
    return jnp.where(zero, 0, y).astype(spec.dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def _one_norm(spec, x, where):
    return jnp.sum(
        absolute(spec.prepare(x)), spec.layout.reduction_axes, where=where, keepdims=True
    )


def _two_norm(spec, x, where):
    return two_norm(x, spec.layout.reduction_axes, where)


@functools.partial(jax.checkpoint, static_argnums=0)
def _infinity_norm(spec, x, where):
    size = absolute(spec.prepare(x))
    return jnp.max(size, spec.layout.reduction_axes, where=where, keepdims=True, initial=0)


_NORMS: dict[float, Callable] = {1: _one_norm, 2: _two_norm, math.inf: _infinity_norm}


def _check_order(order: float) -> float:
    if not isinstance(order, str):
        order = check_number(order, "ord")
    if order not in _NORMS:
        raise ValueError(
            f"ord must be 1, 2 or inf, got {order!r}; divide by another norm yourself, for example "
            "one of jnp.linalg.vector_norm."
        )
    return order
