"""Haiku's norms: parameters, and running statistics with Haiku's debiasing."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.convert.reading import as_numpy, as_scale_or_bias, as_statistic, listed
from jaxnorm.core.arguments import check_number
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.state import BatchNormState, update_weight

_AVERAGES = "mean_ema", "var_ema"


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    name: str,
) -> tuple[NormParams, BatchNormState | None]:
    """Read scale, bias and running statistics of a Haiku norm.

    Haiku's BatchNorm keeps a biased average `hidden`, which starts at zero, and the `average` with
    which it normalizes: hidden / (1 - decay_rate**counter). The latter is the state here.
    `haiku_momentum` goes on from it as Haiku does. Haiku's decay_rate is a momentum, its eps is
    epsilon, and its offset is the bias.

    Args:
      params: what `init` returned, or its first part.
      state: its second part; {} for a model without state.
      name: the name of the norm's module, such as "net/~/batch_norm".

    Returns:
      The parameters, in their own dtype, with None for what the norm lacks; and the state in
      float32 or better, with Haiku's counter as count, or None without averages. Axes of size one
      are dropped, which Haiku keeps: the shape is (features,).

    Raises:
      TypeError: an array is not one of NumPy or JAX.
      ValueError: there is no norm of that name.
    """
    found = params.get(name, {})
    entries = [f"{name}/~/{average}" for average in _AVERAGES]
    tracked = all("average" in state.get(entry, {}) for entry in entries)
    if not (found or tracked) or found.keys() - {"scale", "offset"}:
        norms = {key for key, value in params.items() if not value.keys() - {"scale", "offset"}}
        norms |= {key.rpartition("/~/")[0] for key in state if key.endswith(_AVERAGES)}
        raise ValueError(
            f"name must be that of a norm, got {name!r}; there are {listed(norms)}; a norm without "
            "arrays has none, so take NormParams() for it."
        )
    scale, offset = (
        None if value is None else _features(as_scale_or_bias(value, f"{name}/{key}"))
        for key, value in ((key, found.get(key)) for key in ("scale", "offset"))
    )
    if not tracked:
        return NormParams(scale, offset), None
    mean, var = (_features(as_statistic(state[entry]["average"], entry)) for entry in entries)
    count = int(as_numpy(state[entries[0]]["counter"], f"{entries[0]}/counter"))
    return NormParams(scale, offset), BatchNormState(mean, var, jnp.asarray(count, jnp.int32))


def haiku_momentum(decay_rate: float, count: jax.Array | int) -> jax.Array:
    """Return the momentum of the next step that keeps the state equal to Haiku's debiased average.

        momentum = decay_rate (1 - decay_rate**count) / (1 - decay_rate**(count + 1))

    It is 0 in the first step and grows to decay_rate. Pass it as
    `batch_norm(x, state, momentum=haiku_momentum(decay_rate, state.count))`.

    Args:
      decay_rate: Haiku's, in [0, 1); a Python number.
      count: the updates so far; may be traced.

    Returns:
      A float32 scalar.

    Raises:
      TypeError: decay_rate is not a number that is known while tracing.
      ValueError: it is outside [0, 1).

    Examples:
      >>> import jaxnorm.convert
      >>> [round(float(jaxnorm.convert.haiku_momentum(0.9, n)), 4) for n in (0, 1, 1000)]
      [0.0, 0.4737, 0.9]

    References:
      Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980 (the
      debiasing).
    """
    decay_rate = check_number(decay_rate, "decay_rate")
    if not 0 <= decay_rate < 1:
        raise ValueError(
            f"decay_rate must lie in [0, 1), got {decay_rate}; pass that of Haiku's module."
        )
    if decay_rate == 0:
        return jnp.zeros((), jnp.float32)
    weight = functools.partial(update_weight, decay_rate)
    count = jnp.asarray(count)
    return np.float32(decay_rate) * weight(count) / weight(count + 1)


def _features(value: jax.Array) -> jax.Array:
    """Remove the axes of size one that Haiku keeps."""
    if value.ndim < 2:
        return value
    return value.reshape(tuple(size for size in value.shape if size > 1) or (1,))
