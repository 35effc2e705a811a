"""The arithmetic and the checks of `recalibrate`, for linen and nnx."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxnorm.core.arithmetic import square
from jaxnorm.core.moments import Moments
from jaxnorm.tools.batch_moments import no_batch_moments
from jaxnorm.tools.programs import display_path, model_arguments


class Total(NamedTuple):
    """The moments of all batches so far, as the unevaluated sum of `high` and `low`.

    A small batch may change the mean of many others by less than the rounding of float32, and so
    the count from 2**24 on. The sum of both parts has twice the digits.
    """

    high: Moments
    low: Moments


def zero_total(running_mean: jax.Array) -> Total:
    """Return the total before the first batch, for running statistics of this shape and dtype."""
    zero = no_batch_moments(running_mean).elements
    return Total(zero, zero)


def add_moments(total: Total, new: Moments, reduction: str) -> Total:
    """Add the moments of another batch to the total.

    `reduction` is "pooled", for the moments of all elements, or "mean", for the average of the
    batches' moments, whose count is the number of batches. Mean and variance change by the batch's
    share of their distance from the batch; "pooled" adds the variance between the two means (Chan,
    Golub and LeVeque, 1979).
    """
    (mean, var, count), low = total
    counted = new.count > 0
    size = new.count if reduction == "pooled" else counted.astype(count.dtype)
    number = _add(count, low.count, size)
    share = size / jnp.maximum(number[0], 1)
    # If no element of a batch counted, its moments may be any numbers.
    mean_distance = jnp.where(counted, (new.mean - mean) - low.mean, 0)
    var_change = share * jnp.where(counted, (new.var - var) - low.var, 0)
    if reduction == "pooled":
        # The shares are inside the square, so that it overflows no sooner than the variance.
        root = jnp.sqrt(share * (1 - share)).astype(mean_distance.dtype)
        var_change += square(root * mean_distance)
    means = _add(mean, low.mean, share.astype(mean_distance.dtype) * mean_distance)
    parts = zip(means, _add(var, low.var, var_change), number, strict=True)
    return Total(*(Moments(*part) for part in parts))


def _add(high: jax.Array, low: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return high + low + term as a rounded number and the rest (Knuth's two-sum)."""
    total = high + term
    added = total - high
    rest = (high - (total - added)) + (term - added) + low
    rounded = total + rest
    return rounded, rest - (rounded - total)


def batch_arguments(batches: Iterable[Any]) -> Iterator[tuple]:
    """Yield the model's arguments for each batch."""
    if hasattr(batches, "ndim") or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; put a single "
            "batch into a list."
        )
    number = 0
    for number, batch in enumerate(batches, 1):  # noqa: B007 (counted)
        yield model_arguments(batch)
    if not number:
        raise ValueError("batches must hold at least one batch, got none; pass some of the data.")


def check_totals(totals: dict[str, Moments], remedy: str) -> None:
    """Check that batch norms got elements and that all moments are finite, unless traced."""
    leaves = jax.tree.leaves(totals)
    if leaves and any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    if not any((total.count > 0).any() for total in totals.values()):
        raise ValueError(
            "a batch norm must be called in training mode, and elements must count, got none of "
            f"{', '.join(map(display_path, totals)) or 'them'}; {remedy}."
        )
    finite = lambda total: bool(jnp.isfinite(total.mean).all() & jnp.isfinite(total.var).all())
    if wrong := [display_path(path) for path, total in totals.items() if not finite(total)]:
        raise ValueError(
            "batches must give finite statistics, got NaN or infinity in "
            f"{', '.join(wrong)}; look for the batch that has them, or at the layers before these "
            "norms."
        )


def check_reduction(reduction: str) -> None:
    """Check the way in which the moments of batches are combined."""
    if reduction not in ("pooled", "mean"):
        raise ValueError(
            f'reduction must be "pooled" or "mean", got {reduction!r}; "pooled" gives the moments '
            "of all elements of all batches."
        )
