"""Batch normalization by the running statistics, in training too."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input
from jaxnorm.core.arithmetic import promote, reciprocal_std
from jaxnorm.core.axes import Axes
from jaxnorm.core.devices import AxisName, bound_devices
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.norm import prepare_call, program
from jaxnorm.core.standardize import NormParams, standardize_by
from jaxnorm.core.statistics import statistics
from jaxnorm.functional.state import (
    BatchNormState,
    check_running_dtypes,
    check_state,
    check_weights,
    updated_state,
)


def normalize_by_running(
    x: ArrayLike,
    state: BatchNormState,
    axis_name: AxisName = None,
    *,
    params: NormParams | None = None,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
) -> tuple[jax.Array, BatchNormState]:
    """Update the state by the statistics of x, then standardize x by the new state.

        new = momentum * old + (1 - momentum) * measured; the first time, new = measured
        y = (x - new.mean) / sqrt(new.var + epsilon) * scale + bias

    Gradients flow through the measured statistics and to the old state. Arguments and errors are as
    in `batch_norm`.
    """
    x = check_input(x)
    layout = batch_layout(x.shape, feature_axis)
    state = check_state(state, layout, x.dtype)
    check_running_dtypes(state)
    spec, arrays = prepare_call(
        "batch_norm",
        x,
        layout,
        params,
        epsilon=epsilon,
        devices=bound_devices(axis_name),
        implementation="xla",
    )
    return _normalized(spec, arrays, state, check_weights(momentum))


@program
def _normalized(spec, arrays, state, weights):
    with jax.named_scope(spec.name):
        stats, first = statistics(spec, arrays.x), state.count == 0
        measured = stats.moments(spec.layout)
        new_state = updated_state(state, measured, weights, 0)
        # Before the first update the state may hold any numbers.
        mean, var = (
            jnp.where(first, new.astype(old.dtype), old)
            for new, old in zip(measured[:2], new_state[:2], strict=True)
        )
        # The new mean is the mean of x plus a part of the distance to the old mean. Written so, it
        # keeps the low part of the mean of x, and the difference is not rounded before.
        high, low = stats.mean_high, stats.mean_low
        assert high is not None
        assert low is not None
        old = spec.layout.broadcast(state.mean)
        wide = promote(old.dtype, high.dtype)
        way = spec.prepare((old.astype(wide) - high.astype(wide)) - low.astype(wide))
        low = low + jnp.where(first, 0, weights[0] * way)
        rstd = reciprocal_std(spec.layout.broadcast(var), spec.epsilon)
        y = standardize_by(spec, arrays.x, high, low, rstd, arrays.params)
    return y, BatchNormState(mean, var, new_state.count)
