"""What a batch norm saw in training mode: of all elements, and from example to example."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arithmetic import promote, real_dtype
from jaxnorm.core.axes import Axes, canonical_axes, other_axes
from jaxnorm.core.devices import is_bound
from jaxnorm.core.moments import Moments
from jaxnorm.functional.moments import merge_moments, moments


class Seen(NamedTuple):
    """Moments, each of the shape of the running statistics.

    The positions of an image resemble each other, so their number does not tell how far the mean of
    a batch may be from that of all data. The spread of the examples does.

    Attributes:
      elements: of all elements that counted.
      means: over examples, of the mean of each.
      squares: over examples, of the mean squared distance of each from the running mean.
    """

    elements: Moments
    means: Moments
    squares: Moments


def nothing_seen(running_mean: jax.Array) -> Seen:
    """Moments of no elements, for running statistics like these."""
    mean = jnp.zeros(running_mean.shape, promote(running_mean.dtype, jnp.float32))
    real = jnp.zeros(mean.shape, real_dtype(mean.dtype))
    return Seen(Moments(mean, real, real), Moments(mean, real, real), Moments(real, real, real))


def merge_seen(a: Seen, b: Seen) -> Seen:
    """What was seen in two calls together."""
    return Seen(*(merge_moments(one, other) for one, other in zip(a, b, strict=True)))


def look(
    x: ArrayLike, running_mean: jax.Array, feature_axis: Axes, where: Any, axis_name: Any
) -> Seen:
    """What a batch norm sees of x, whose first axis holds the examples.

    Args:
      x: its input.
      running_mean: its running mean before this call, of shape (features,).
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
    shape = running_mean.shape
    flat = lambda seen: Moments(*(part.reshape(shape) for part in seen))
    elements = flat(moments(x, reduced, where=where, axis_name=axis_name))
    centre = running_mean.reshape([x.shape[i] if i in features else 1 for i in range(x.ndim)])
    distance = jnp.abs(x - jnp.broadcast_to(centre.astype(x.dtype), x.shape))
    return Seen(
        elements,
        *(
            flat(_of_examples(values, reduced, where, axis_name))
            for values in (x, distance * distance)
        ),
    )


def _of_examples(x: jax.Array, reduced: tuple[int, ...], where, axis_name) -> Moments:
    """Moments over the first axis of the means over the other reduced axes."""
    if not reduced or reduced[0] != 0:  # no axis of examples
        return moments(x, reduced, where=where, axis_name=axis_name)
    counted = True if where is None else where
    if reduced[1:]:
        within = moments(x, reduced[1:], where=where)
        x, counted = within.mean, within.count > 0
    return moments(x, 0, where=counted, axis_name=axis_name)


def names_here(axis_name: Any, axis_index_groups: Any) -> Any:
    """The axis name of a norm, or None if nothing binds it: its statistics are then of the whole x.

    With groups the name stays, because they have no such equivalent.
    """
    if axis_name is None or axis_index_groups is not None or is_bound(axis_name):
        return axis_name
    return None


def add_seen(total: Moments, new: Moments, how: str) -> Moments:
    """The moments of another batch added to those of the batches before.

    `how` is "pooled", for the moments of all elements, or "mean", for the average of the batches'
    moments, whose count is the number of batches.
    """
    if how == "pooled":
        return merge_moments(total, new)
    counted = new.count > 0
    number = total.count + counted.astype(total.count.dtype)
    weight = jnp.where(counted, 1 / jnp.maximum(number, 1), 0)
    part = lambda old, value: old + (value - old) * weight.astype(old.dtype)
    return Moments(part(total.mean, new.mean), part(total.var, new.var), number)


def check_how(how: str) -> None:
    """Check the way in which batches are put together."""
    if how not in ("pooled", "mean"):
        raise ValueError(
            f'how must be "pooled" or "mean", got {how!r}; "pooled" gives the moments of all that '
            "was seen."
        )
