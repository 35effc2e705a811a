"""What a batch norm saw in training mode: of all elements, and from example to example."""

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
    """Moments, and how far they may be from those of all data; of the running statistics' shape.

    The positions of an image resemble each other, so their number does not tell how far the mean of
    a batch may be from that of all data. Examples are independent, so the spread of their sums
    does: sums, because examples may have different numbers of elements.

    Attributes:
      elements: moments of all elements that counted.
      examples: how many examples had such elements.
      sums: the 2-norm over examples of each one's sum of x - mean.
      squares: the 2-norm over examples of each one's sum of (x - mean)^2 - var.
    """

    elements: Moments
    examples: jax.Array
    sums: jax.Array
    squares: jax.Array


def no_batch_moments(running_mean: jax.Array) -> BatchMoments:
    """What was observed before the first call, for running statistics like these."""
    mean = jnp.zeros(running_mean.shape, promote(running_mean.dtype, jnp.float32))
    real = jnp.zeros(mean.shape, real_dtype(mean.dtype))
    return BatchMoments(Moments(mean, real, real), real, real, real)


def merge_batch_moments(a: BatchMoments, b: BatchMoments) -> BatchMoments:
    """What was seen in two calls together.

    They may have observed the same examples: a layer of two branches, or a step of a recurrent
    network. Then examples are as many as before, and the norm of the sums is at most the sum of the
    norms.
    """
    elements = merge_moments(a.elements, b.elements)

    def squares(observed):  # about another mean, by the binomial formula
        distance = jnp.abs(observed.elements.mean - elements.mean)
        return observed.squares + 2 * distance * observed.sums

    examples = jnp.maximum(a.examples, b.examples)
    return BatchMoments(elements, examples, a.sums + b.sums, squares(a) + squares(b))


def observe(
    x: ArrayLike, shape: tuple[int, ...], feature_axis: Axes, where: Any, axis_name: Any
) -> BatchMoments:
    """What a batch norm sees of x, whose first axis holds the examples.

    If the first axis is a feature axis, each element counts as an example.

    Args:
      x: its input.
      shape: the shape of its running statistics.
      feature_axis: its feature axis or axes.
      where: its mask, or None.
      axis_name: its axis name, or None.
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
    spread = lambda a: jnp.expand_dims(a, reduced)
    centred = x - spread(mean)
    deviation = jnp.sqrt(var)
    unit = spread(jnp.where(var > 0, deviation, 1))
    scaled = jnp.abs(centred) / unit  # squares of squares may underflow
    everywhere = lambda a: a if axis_name is None else jax.lax.psum(a, axis_name)
    total = lambda a: jnp.sum(a, within, where=where, keepdims=True)
    norm = lambda a: jnp.sqrt(everywhere(jnp.sum(jnp.square(a), across)))
    if where is None:
        here = jnp.full_like(var, math.prod(x.shape[axis] for axis in across))
    else:
        counted = jnp.any(jnp.broadcast_to(where, x.shape), within, keepdims=True)
        here = jnp.sum(counted.astype(var.dtype), across)
    examples = everywhere(here)
    flat = lambda a: a.reshape(shape)
    sums = flat(norm(jnp.abs(total(centred)) / unit)) * flat(deviation)
    squares = flat(norm(total(scaled * scaled - 1))) * flat(var)
    elements = Moments(flat(mean), flat(var), flat(count))
    return BatchMoments(elements, flat(examples), sums, squares)


def bound_axis_name(axis_name: Any, axis_index_groups: Any) -> Any:
    """The axis name of a norm, or None if nothing binds it: its statistics are then of the whole x.

    With groups the name stays, because they have no such equivalent.
    """
    if axis_name is None or axis_index_groups is not None or is_bound(axis_name):
        return axis_name
    return None
