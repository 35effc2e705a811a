"""Recalibration: running statistics measured on given batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxnorm._modules import cast_and_place_like
from jaxnorm.nnx.instrumented import instrumented, norms_of
from jaxnorm.nnx.replace import modules_of
from jaxnorm.tools.batch_moments import no_batch_moments
from jaxnorm.tools.programs import StaticArguments, memoize, partition
from jaxnorm.tools.recalibrate import (
    add_moments,
    batch_arguments,
    check_reduction,
    check_totals,
    zero_total,
)


def recalibrate(
    model: nnx.Module, batches: Iterable[Any], *, reduction: str = "pooled", **call: Any
) -> None:
    """Replace the running statistics of batch norms by statistics of these batches, in place.

    Use this if the running statistics don't fit the parameters or the data: after averaging,
    rounding or converting weights, or for another data set. A copy of the model is called on each
    batch in training mode. The inputs of each batch norm are measured as the norm measures them,
    masks included; the result replaces its running mean and variance. Parameters, modes and all
    other state stay the same, as do the statistics of a norm that is frozen or is not called. If a
    batch raises an error, the model does not change.

    Args:
      model: any nnx module, whose batch norms are Flax's or jaxnorm's.
      batches: arrays, or tuples of the model's arguments; of (images, labels) the images alone. For
        a progress bar, pass `tqdm(batches)`. Sharded arrays count as a whole; an axis name that
        nothing binds is then left out.
      reduction: "pooled" for the moments of all elements of all batches, or "mean" for the average
        of the batches' means and (biased) variances, as PyTorch's `update_bn` has it but for its
        factor n / (n - 1) of the variances.
      **call: keywords of the model's call, such as `train=True`, if it has any.

    Raises:
      TypeError: the model is not an nnx module, or batches are an array.
      ValueError: there are no batches, no batch norm is called in training mode, statistics are not
        finite, or `reduction` is neither.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> model = nnx.Sequential(jn.BatchNorm(1, rngs=nnx.Rngs(0)), nnx.relu)
      >>> jn.recalibrate(model, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])])
      >>> model.layers[0].mean[...], model.layers[0].var[...]
      (Array([4.], dtype=float32), Array([5.], dtype=float32))

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
      arXiv:1803.05407; Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576
      (pooled statistics).
    """
    check_reduction(reduction)
    originals: dict[str, Any] = modules_of(model)
    copy = instrumented(model)
    totals = {path: zero_total(norm.mean[...]) for path, norm in norms_of(copy).items()}
    if not totals:
        raise ValueError("model must have a batch norm, got none; there is nothing to recalibrate.")

    static, arrays = partition(call)
    measure = _program(reduction, static)
    for arguments in batch_arguments(batches):
        totals = measure(copy, totals, arrays, *arguments)
    moments = {path: total.high for path, total in totals.items()}
    check_totals(moments, "unfreeze some, or pass what makes the model train")
    for path, (mean, var, count) in moments.items():
        for stat, value in ((originals[path].mean, mean), (originals[path].var, var)):
            stat.set_value(cast_and_place_like(stat[...], jnp.where(count > 0, value, stat[...])))


@memoize
def _program(reduction: str, static: StaticArguments) -> Callable:
    """Make a program that adds the moments of one batch to the totals."""

    @nnx.jit
    def measure(copy, totals, arrays, *arguments):
        norms = norms_of(copy)
        for norm in norms.values():
            norm.observed.set_value(no_batch_moments(norm.mean[...]))
        copy(*arguments, **static.combine(arrays))
        new = {path: norm.observed.get_value().elements for path, norm in norms.items()}
        return {path: add_moments(totals[path], part, reduction) for path, part in new.items()}

    return measure
