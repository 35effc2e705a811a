"""What `jaxnorm.linen.recalibrate` and `jaxnorm.nnx.recalibrate` share."""

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
    """The moments of all batches so far: `high`, and what its dtype does not hold of them, `low`.

    A small batch moves the mean of many by less than float32 may hold, and their count by less than
    it holds from 2**24 on. The sum of both parts has twice the digits.
    """

    high: Moments
    low: Moments


def zero_total(running_mean: jax.Array) -> Total:
    """The total before the first batch, for running statistics like these."""
    nothing = no_batch_moments(running_mean).elements
    return Total(nothing, nothing)


def add_moments(total: Total, new: Moments, reduction: str) -> Total:
    """The moments of another batch added to those of the batches before.

    `reduction` is "pooled", for the moments of all elements, or "mean", for the average of the
    batches' moments, whose count is the number of batches. Each part moves by the batch's share of
    the distance to that of the batch; "pooled" adds the variance between the two means (Chan, Golub
    and LeVeque, 1979).
    """
    (mean, var, count), low = total
    counted = new.count > 0
    size = new.count if reduction == "pooled" else counted.astype(count.dtype)
    number = _add(count, low.count, size)
    share = size / jnp.maximum(number[0], 1)
    # The numbers of a batch in which nothing counted may be anything.
    of_mean = jnp.where(counted, (new.mean - mean) - low.mean, 0)
    of_var = share * jnp.where(counted, (new.var - var) - low.var, 0)
    if reduction == "pooled":
        # The shares are part of the square, so that it overflows no sooner than the variance.
        of_var += square(jnp.sqrt(share * (1 - share)).astype(of_mean.dtype) * of_mean)
    means = _add(mean, low.mean, share.astype(of_mean.dtype) * of_mean)
    parts = zip(means, _add(var, low.var, of_var), number, strict=True)
    return Total(*(Moments(*part) for part in parts))


def _add(high: jax.Array, low: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """high + low + term, as a rounded number and the rest (Knuth's two-sum)."""
    total = high + term
    moved = total - high
    rest = (high - (total - moved)) + (term - moved) + low
    rounded = total + rest
    return rounded, rest - (rounded - total)


def batch_arguments(batches: Iterable[Any]) -> Iterator[tuple]:
    """The model's arguments of each batch."""
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
    """Check that batch norms saw something, and nothing that is not finite; not while traced."""
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
            f"{', '.join(wrong)}; look for the batch that has them, or for what comes before these "
            "norms."
        )


def check_reduction(reduction: str) -> None:
    """Check the way in which batches are put together."""
    if reduction not in ("pooled", "mean"):
        raise ValueError(
            f'reduction must be "pooled" or "mean", got {reduction!r}; "pooled" gives the moments '
            "of all elements of all batches."
        )
