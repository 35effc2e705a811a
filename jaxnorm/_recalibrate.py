"""What `jaxnorm.linen.recalibrate` and `jaxnorm.nnx.recalibrate` share."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxnorm._seen import named
from jaxnorm.core.moments import Moments
from jaxnorm.functional.moments import merge_moments


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


def arguments_of(batches: Iterable[Any]) -> Iterator[tuple]:
    """The model's arguments of each batch."""
    if hasattr(batches, "ndim") or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; put a single "
            "batch into a list."
        )
    number = 0
    for number, batch in enumerate(batches, 1):  # noqa: B007 (counted)
        yield batch if type(batch) is tuple else (batch,)
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
            f"{', '.join(map(named, totals)) or 'them'}; {remedy}."
        )
    finite = lambda total: bool(jnp.isfinite(total.mean).all() & jnp.isfinite(total.var).all())
    if wrong := [named(path) for path, total in totals.items() if not finite(total)]:
        raise ValueError(
            "batches must give finite statistics, got NaN or infinity in "
            f"{', '.join(wrong)}; look for the batch that has them, or for what comes before these "
            "norms."
        )


def check_how(how: str) -> None:
    """Check the way in which batches are put together."""
    if how not in ("pooled", "mean"):
        raise ValueError(
            f'how must be "pooled" or "mean", got {how!r}; "pooled" gives the moments of all that '
            "was seen."
        )
