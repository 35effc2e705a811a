"""Layer and rms norm, with and without a residual: statistics over the given axes."""

from typing import Any

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_residual
from jaxnorm.core.axes import Axes
from jaxnorm.core.layouts import layer_layout
from jaxnorm.core.norm import norm, norm_of_sum, prepare_call
from jaxnorm.core.standardize import NormParams


def norm_over_axes(
    name: str, x: ArrayLike, params: NormParams | None, axis: Axes, **options: Any
) -> jax.Array:
    """Return the norm of x over the axes; `options` are those of `prepare_call`."""
    x = check_input(x)
    return norm(*prepare_call(name, x, layer_layout(x.shape, axis), params, **options))


def norm_of_sum_over_axes(
    name: str,
    x: ArrayLike,
    residual: ArrayLike,
    params: NormParams | None,
    axis: Axes,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the norm of x + residual over the axes, and this sum."""
    x = check_input(x)
    options["residual"] = check_residual(residual, x)
    return norm_of_sum(*prepare_call(name, x, layer_layout(x.shape, axis), params, **options))
