"""The running statistics of batch norm, and their update."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxnorm.core.arguments import check_feature_array, is_number
from jaxnorm.core.arithmetic import as_array, promote
from jaxnorm.core.exporting import jit
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Moments
from jaxnorm.functional.moments import check_moments


@functools.partial(
    export.register_namedtuple_serialization, serialized_name="jaxnorm.BatchNormState"
)
class BatchNormState(NamedTuple):
    """The running statistics of a batch norm.

    Attributes:
      mean: running mean of each feature.
      var: running variance of each feature.
      count: updates so far, int32.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)


Weights = tuple[float | jax.Array, float | jax.Array] | None


def init_batch_norm_state(
    features: int | tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> BatchNormState:
    """Make the initial state: mean zero, variance one, no updates.

    Args:
      features: the number of features, or their shape.
      dtype: of the mean, float32 or better; in half precision it would stop moving. The variance
        is real.

    Raises:
      TypeError: the dtype is not one of those.

    Examples:
      >>> import jaxnorm as jn
      >>> jn.init_batch_norm_state(2)
      BatchNormState(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32), \
count=Array(0, dtype=int32))
    """
    _check_running_dtype(jnp.dtype(dtype), "dtype")
    mean = jnp.zeros(features, dtype)
    return BatchNormState(mean, jnp.ones_like(mean.real), jnp.zeros((), jnp.int32))


def update_batch_norm_state(
    state: BatchNormState,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    ddof: int = 0,
) -> BatchNormState:
    """Update the state by the moments.

        new = momentum * old + (1 - momentum) * measured

    Args:
      state: the running statistics.
      moments: the new moments, of the same shape; features with count zero keep their state, if
        their mean and variance are finite.
      momentum: the weight of the old state, in [0, 1]; None: the cumulative average; one count
        serves all features.
      ddof: subtracted from the count that divides the sum of squares: 1 is the unbiased estimate
        (where count > 1).

    Returns:
      A state of the same shapes and dtypes, its count one higher if anything counted.

    Raises:
      TypeError: state is not a BatchNormState of float32 or better, or moments not a Moments.
      ValueError: the shapes differ, momentum is outside [0, 1], or ddof is not a count.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> state = jn.init_batch_norm_state(1)
      >>> measured = jn.moments(jnp.array([[2.0], [4.0]]), axis=0)
      >>> jn.update_batch_norm_state(state, measured, momentum=0.5, ddof=1).var
      Array([1.5], dtype=float32)
    """
    _check_state_type(state)
    state = BatchNormState(*map(as_array, state))
    check_running_dtypes(state)
    moments = check_moments(moments)
    if state.mean.shape != moments.mean.shape:
        raise ValueError(
            f"moments must have the shape of the state, {state.mean.shape}, got "
            f"{moments.mean.shape}; measure over all axes but the features'."
        )
    return _updated_state(state, moments, check_weights(momentum), check_ddof(ddof))


def updated_state(
    state: BatchNormState, moments: Moments, weights: Weights, ddof: int
) -> BatchNormState:
    """Return the new state; the arguments have been checked."""
    counted = moments.count > 0
    if weights is None:
        updates = state.count.astype(state.var.dtype)
        keep, gain = updates / (updates + 1), 1 / (updates + 1)
    else:
        keep, gain = weights
    unbiased = moments.count / jnp.maximum(moments.count - ddof, 1)

    def average(old, measured):
        if jnp.iscomplexobj(measured):
            old = old.astype(promote(old.dtype, jnp.complex64))
        measured = measured.astype(old.dtype)
        kept, gained = jnp.where(counted, keep, 1), jnp.where(counted, gain, 0)
        return kept.astype(old.dtype) * old + gained.astype(old.dtype) * measured

    return BatchNormState(
        average(state.mean, moments.mean),
        average(state.var, moments.var * unbiased),
        state.count + jnp.any(counted).astype(state.count.dtype),
    )


_updated_state = jit(updated_state, static_argnums=3)


def update_weight(momentum: float, count: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Return 1 - momentum**count, the weight of all updates in a running average.

    Computed directly, the subtraction would cancel.
    """
    if momentum == 0:
        return (count > 0).astype(dtype)
    logarithm = np.asarray(math.log(momentum), dtype)
    return -jnp.expm1(count.astype(dtype) * logarithm)


@functools.partial(jit, static_argnums=1)
def debiased(state: BatchNormState, momentum: float) -> BatchNormState:
    """Divide the running statistics by the weight of their updates.

    If the state started at zero, the result is the average of the measured moments. Before any
    update it is the state itself.
    """
    check_weights(momentum)
    weight = update_weight(momentum, state.count, state.var.dtype)
    weight = jnp.where(weight > 0, weight, 1)
    return state._replace(mean=state.mean / weight.astype(state.mean.dtype), var=state.var / weight)


def check_weights(momentum: float | jax.Array | None) -> Weights:
    """Return the weights of the old state and the new moments; None for the cumulative average."""
    if momentum is None:
        return None
    if not is_number(momentum):
        raise TypeError(
            f"momentum must be a number or None, got {type(momentum).__name__}; pass for example "
            "momentum=0.99."
        )
    if isinstance(momentum, Tracer):
        return momentum, 1 - momentum
    momentum = float(momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1] or be None, got {momentum}; it is the weight of the old "
            "statistics, so PyTorch's momentum m is 1 - m here."
        )
    return momentum, 1 - momentum


def check_ddof(ddof: int) -> int:
    """Return the number that is subtracted from the count."""
    if not isinstance(ddof, int | np.integer) or ddof < 0:
        raise ValueError(f"ddof must be an integer of at least 0, got {ddof!r}; pass 0 or 1.")
    return int(ddof)


def check_state(state: BatchNormState, layout: Layout, dtype: jnp.dtype) -> BatchNormState:
    """Return a state whose arrays fit the layout and an x of that dtype."""
    _check_state_type(state)
    mean = check_feature_array(state.mean, "state.mean", layout, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"state.mean must be complex where x is, got {mean.dtype} for x of {dtype}; make it "
            "with jaxnorm.init_batch_norm_state(features, dtype)."
        )
    var = check_feature_array(state.var, "state.var", layout, dtype)
    return BatchNormState(mean, var, as_array(state.count))


def _check_state_type(state: BatchNormState) -> None:
    if not isinstance(state, BatchNormState):
        raise TypeError(
            f"state must be a BatchNormState, got {type(state).__name__}; start with "
            "jaxnorm.init_batch_norm_state(features)."
        )


def check_running_dtypes(state: BatchNormState) -> None:
    """Check that the dtypes of the state hold the small steps of a running average."""
    _check_running_dtype(state.mean.dtype, "state.mean")
    _check_running_dtype(state.var.dtype, "state.var")


def _check_running_dtype(dtype: jnp.dtype, name: str) -> None:
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} must be float32 or better, got {dtype}; smaller types round away the steps of "
            "a running average, so keep it in float32."
        )
