"""Moments of the inputs of a batch norm in training mode, and their variation over examples."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arithmetic import promote, real_dtype
from jaxnorm.core.axes import Axes, canonical_axes, other_axes
from jaxnorm.core.devices import is_bound
from jaxnorm.core.moments import Moments
from jaxnorm.functional.moments import merge_moments, moments


class BatchMoments(NamedTuple):
    """Moments of a batch, and sums over examples for their standard errors.

    The arrays have the shape of the running statistics. The positions of an image are correlated,
    so a standard error can't be computed from their number. Examples are independent, so it is
    computed from the spread of their sums. (Not of their means, because masks may give examples
    different numbers of elements.)

    Attributes:
      elements: moments of all elements that counted.
      examples: the number of examples that had such elements.
      sums: the 2-norm over examples of each one's sum of x - mean.
      squares: the 2-norm over examples of each one's sum of (x - mean)^2 - var.
    """

    elements: Moments
    examples: jax.Array
    sums: jax.Array
    squares: jax.Array


def no_batch_moments(running_mean: jax.Array) -> BatchMoments:
    """Return the moments before the first call, for running statistics of this shape and dtype."""
    mean = jnp.zeros(running_mean.shape, promote(running_mean.dtype, jnp.float32))
    real = jnp.zeros(mean.shape, real_dtype(mean.dtype))
    return BatchMoments(Moments(mean, real, real), real, real, real)


def merge_batch_moments(a: BatchMoments, b: BatchMoments) -> BatchMoments:
    """Merge the moments of two calls.

    Both calls may have had the same examples, such as a layer of two branches or a step of a
    recurrent network. So the number of examples is the larger of both. The norms of sums are added,
    which gives an upper bound.
    """
    elements = merge_moments(a.elements, b.elements)

    def squares(observed):  # about the merged mean, by the binomial formula
        distance = jnp.abs(observed.elements.mean - elements.mean)
        return observed.squares + 2 * distance * observed.sums

    examples = jnp.maximum(a.examples, b.examples)
    return BatchMoments(elements, examples, a.sums + b.sums, squares(a) + squares(b))


def observe(
    x: ArrayLike, shape: tuple[int, ...], feature_axis: Axes, where: Any, axis_name: Any
) -> BatchMoments:
    """Return the moments of x, the input of a batch norm, whose first axis holds the examples.

    If the first axis is a feature axis, each element counts as an example.

    Args:
      x: the input.
      shape: the shape of the running statistics.
      feature_axis: the norm's feature axis or axes.
      where: the norm's mask, or None.
      axis_name: the norm's axis name, or None.
    """
    x = jnp.asarray(x)
    x = x.astype(promote(x.dtype, jnp.float32))
    if where is not None:
        where = jnp.asarray(where, bool)
        where = where.reshape((1,) * (x.ndim - where.ndim) + where.shape)
    features = canonical_axes(feature_axis, x.ndim)
    reduced = other_axes(features, x.ndim)
    across, within = (reduced[:1], reduced[1:]) if reduced[:1] == (0,) else (reduced, ())
    mean, var, count = moments(x, reduced, where=where, axis_name=axis_name)
    expand = lambda a: jnp.expand_dims(a, reduced)
    centred = x - expand(mean)
    deviation = jnp.sqrt(var)
    unit = expand(jnp.where(var > 0, deviation, 1))
    scaled = jnp.abs(centred) / unit  # squares of squares may underflow
    over_devices = lambda a: a if axis_name is None else jax.lax.psum(a, axis_name)
    total = lambda a: jnp.sum(a, within, where=where, keepdims=True)
    norm = lambda a: jnp.sqrt(over_devices(jnp.sum(jnp.square(a), across)))
    if where is None:
        local_examples = jnp.full_like(var, math.prod(x.shape[axis] for axis in across))
    else:
        counted = jnp.any(jnp.broadcast_to(where, x.shape), within, keepdims=True)
        local_examples = jnp.sum(counted.astype(var.dtype), across)
    examples = over_devices(local_examples)
    to_shape = lambda a: a.reshape(shape)
    sums = to_shape(norm(jnp.abs(total(centred)) / unit)) * to_shape(deviation)
    squares = to_shape(norm(total(scaled * scaled - 1))) * to_shape(var)
    elements = Moments(to_shape(mean), to_shape(var), to_shape(count))
    return BatchMoments(elements, to_shape(examples), sums, squares)


def bound_axis_name(axis_name: Any, axis_index_groups: Any) -> Any:
    """Return the axis name of a norm, or None if it is not bound: x then holds the whole batch.

    With groups, return the name in any case: statistics of groups need it.
    """
    if axis_name is None or axis_index_groups is not None or is_bound(axis_name):
        return axis_name
    return None
