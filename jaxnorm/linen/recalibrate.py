"""Recalibration: running statistics measured on given batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm._modules import cast_and_place_like
from jaxnorm.linen.instrumented import by_structure, check_model, instrumented_call, norms_of
from jaxnorm.tools.programs import StaticArguments, StaticByKey, memoize, partition
from jaxnorm.tools.recalibrate import (
    add_moments,
    batch_arguments,
    check_reduction,
    check_totals,
    zero_total,
)


def recalibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    reduction: str = "pooled",
    **call: Any,
) -> Any:
    """Replace the running statistics of batch norms by statistics of these batches.

    Use this if the running statistics don't fit the parameters or the data: after averaging,
    rounding or converting weights, or for another data set. The model is called on each batch in
    training mode. The inputs of each batch norm are measured as the norm measures them, masks
    included; the result replaces its running mean and variance. All other variables stay the same,
    as do the statistics of a norm that is frozen or is not called.

    Args:
      model: a linen module, whose batch norms are Flax's or jaxnorm's.
      variables: those of the model, with "params" and "batch_stats".
      batches: arrays, or tuples of the model's arguments; of (images, labels) the images alone. For
        a progress bar, pass `tqdm(batches)`. Sharded arrays count as a whole; an axis name that
        nothing binds is then left out.
      reduction: "pooled" for the moments of all elements of all batches, or "mean" for the average
        of the batches' means and (biased) variances, as PyTorch's `update_bn` has it but for its
        factor n / (n - 1) of the variances.
      **call: other arguments of `model.apply`, such as `train=True` if the model needs it to train,
        or `rngs`, from which each batch gets its own.

    Returns:
      New variables of the same structure, dtypes and shardings.

    Raises:
      TypeError: the model is not a linen module, the variables are no mapping, or batches are an
        array.
      ValueError: there are no batches, no batch norm is called in training mode, statistics are not
        finite, or `reduction` is neither.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])]
      >>> variables = model.init(jax.random.key(0), batches[0])
      >>> jn.recalibrate(model, variables, batches)["batch_stats"]
      {'mean': Array([4.], dtype=float32), 'var': Array([5.], dtype=float32)}

    References:
      Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
      arXiv:1803.05407; Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576
      (pooled statistics).
    """
    check_model(model, variables)
    check_reduction(reduction)
    rngs = call.pop("rngs", {})
    static, arrays = partition(call)
    measure = _program(by_structure(model), reduction, static)
    stats: dict[Any, Any] = flatten_dict(variables.get("batch_stats", {}))
    totals = {path: zero_total(stats[(*path, "mean")]) for path in norms_of(stats)}
    for number, arguments in enumerate(batch_arguments(batches)):
        totals = measure(variables, totals, jnp.int32(number), rngs, arrays, *arguments)
    remedy = "pass what makes the model train, such as train=True, and unfreeze norms"
    check_totals({"/".join(path): total.high for path, total in totals.items()}, remedy)
    for path, (moments, _) in totals.items():
        for name in ("mean", "var"):
            old = stats[(*path, name)]
            new = getattr(moments, name)
            stats[(*path, name)] = cast_and_place_like(old, jnp.where(moments.count > 0, new, old))
    new = {"batch_stats": unflatten_dict(stats)}
    return variables.copy(new) if isinstance(variables, FrozenDict) else {**variables, **new}


@memoize
def _program(model: StaticByKey, reduction: str, static: StaticArguments) -> Callable:
    """Make a program that adds the moments of one batch to the totals."""

    @jax.jit
    def measure(variables, totals, number, rngs, arrays, *arguments):
        call = static.combine(arrays)
        if rngs:
            call["rngs"] = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
        observed, _ = instrumented_call(model.value, variables, arguments, call)
        return {
            path: add_moments(totals[path], part.elements, reduction)
            for path, part in observed.items()
        }

    return measure
