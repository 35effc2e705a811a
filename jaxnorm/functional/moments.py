"""Moments of arrays: measured and merged."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.arithmetic import as_array, promote
from jaxnorm.core.axes import Axes
from jaxnorm.core.devices import AxisGroups, AxisName, bound_devices, over_rows
from jaxnorm.core.exporting import jit
from jaxnorm.core.layouts import moments_layout
from jaxnorm.core.moments import Moments, merge
from jaxnorm.core.norm import program
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.statistics import statistics


def moments(
    x: ArrayLike,
    axis: Axes,
    *,
    where: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisGroups = None,
) -> Moments:
    """Measure mean, biased variance and count of x over `axis` and the devices of `axis_name`.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      axis: the axis or axes to measure over.
      where: boolean, broadcastable to x: True counts.
      axis_name: a name or a tuple of names, bound by `jax.shard_map`, `jax.pmap` or `jax.vmap`.
      axis_index_groups: lists of indices along `axis_name` that share statistics; None is all.

    Returns:
      Moments of the shape of x without `axis`, in float32 or better. Where nothing counts, all of
      them are zero.

    Raises:
      TypeError: x is of an integer type, or `where` is not boolean.
      ValueError: an axis is out of range or given twice, `where` does not broadcast, x is a
        scalar, or nothing binds `axis_name` (also a NameError).

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> mean, var, count = jn.moments(jnp.array([2.0, 4.0, 6.0, 8.0, 10.0]), axis=0)
      >>> float(mean), float(var), float(count)
      (6.0, 8.0, 5.0)

    References:
      Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances", 1979.
    """
    x = check_input(x)
    layout = moments_layout(x.shape, axis)
    devices = bound_devices(axis_name, axis_index_groups)
    dtype = promote(x.dtype, jnp.float32)
    return _moments(
        NormSpec("moments", layout, dtype, dtype, devices=devices), x, layout.mask(where)
    )


@program
def _moments(spec, x, where):
    with jax.named_scope(spec.name):
        return statistics(spec, x, where).moments(spec.layout)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Merge the moments of two sets of elements; their counts may differ, and may be zero.

    The result is rounded to the dtype of a and b. In float32 a count is exact up to 2**24, and
    moments of few elements may be too small to move those of very many: merge moments of similar
    counts, or use float64.

    Args:
      a: moments, whose arrays all have one shape.
      b: moments of the same shape.

    Returns:
      Moments of that shape, as if measured over all elements at once.

    Raises:
      TypeError: a or b is not a Moments.
      ValueError: the shapes differ.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> a, b = jnp.array([2.0, 4.0]), jnp.array([6.0, 8.0, 10.0])
      >>> merged = jn.merge_moments(jn.moments(a, 0), jn.moments(b, 0))
      >>> [float(part) for part in merged]
      [6.0, 8.0, 5.0]

    References:
      Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
      Variances", 1979.
    """
    a, b = check_moments(a), check_moments(b)
    shapes = [part.shape for part in (*a, *b)]
    if len(set(shapes)) > 1:
        raise ValueError(
            "merge_moments must be given moments of one shape, got mean, var and count of shapes "
            f"{shapes[:3]} and {shapes[3:]}; measure both over the same features."
        )
    return _merged(a, b)


@jit
def _merged(a, b):
    mean, var, count = jax.tree.map(_stack, a, b)
    high, low, var, count = over_rows(merge, (mean, jnp.zeros_like(mean), var, count))
    return Moments(high + low, var, count)


def check_moments(moments: Moments) -> Moments:
    """Return moments whose parts are JAX arrays."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"moments must be a Moments, got {type(moments).__name__}; measure them with "
            "jaxnorm.moments(x, axis)."
        )
    mean, var, count = map(as_array, moments)
    if jnp.issubdtype(count.dtype, jnp.integer):  # sums of counts may overflow
        count = count.astype(var.dtype)
    return Moments(mean, var, count)


def _stack(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = promote(a.dtype, b.dtype)
    return jnp.stack([a.astype(dtype), b.astype(dtype)])
