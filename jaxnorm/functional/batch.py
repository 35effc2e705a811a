"""Batch normalization: statistics of each feature over the whole batch, and over devices."""

from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core.devices import AxisGroups, AxisName, bound_devices
from jaxnorm.core.layout import Axes, Layout, batch_layout, check_input
from jaxnorm.core.moments import Moments, promote
from jaxnorm.core.normalize import check_feature_array, normalize, normalize_with
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.moments import check_moments
from jaxnorm.kernels import check_implementation


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


def init_batch_norm_state(
    features: int | tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> BatchNormState:
    """The state before any update: mean zero, variance one.

    Args:
      features: the number of features, or their shape.
      dtype: of the mean, float32 or better: halves would stall. The variance is real.

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


def batch_norm(
    x: ArrayLike,
    state: BatchNormState,
    axis_name: AxisName = None,
    *,
    params: NormParams | None = None,
    train: bool = True,
    momentum: float | jax.Array | None = 0.99,
    epsilon: float = 1e-5,
    feature_axis: Axes = -1,
    where: ArrayLike | None = None,
    axis_index_groups: AxisGroups = None,
    ddof: int = 0,
    virtual_batch_size: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, BatchNormState]:
    """Batch normalization: zero mean and unit variance for each feature over the batch.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    In training, mean and variance are those of x over all axes but the features', and over the
    devices of `axis_name`; the state moves towards them. Else they are the state's.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      state: the running statistics, of shape (features,).
      axis_name: a name or a tuple of names, bound by `jax.shard_map`, `jax.pmap` or `jax.vmap`,
        over which statistics are shared; None inside such a map means local statistics. Under
        plain `jax.jit` statistics are global without it, however x is sharded.
      params: scale and bias of shape (features,), or None.
      train: whether to measure x and update the state; a Python bool.
      momentum: the weight that the old state keeps, in [0, 1]; None is the average of all updates
        (which all features must then have been part of: there is one count for all).
      epsilon: added to the variance; in units of x squared.
      feature_axis: the axis of the features, or several; state and params then have their shape,
        in the order of x.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is
        standardized, so a NaN there stays one, and makes the gradient NaN: fill it with a number.
        A feature of which nothing counts becomes its bias and keeps its state.
      axis_index_groups: lists of indices along `axis_name` that share statistics; None is all.
      ddof: 1 divides the running variance by count - 1, as PyTorch does; y is not affected.
      virtual_batch_size: ghost batch norm: that many examples of the batch, the first axis without
        features, share statistics, then as many of the next. On each device by itself; the state
        is moved by the moments of the whole batch, and of all devices of `axis_name`.
      implementation: "kernel" for the platform's kernel, "xla" for the formulas; None is what
        JAXNORM_IMPLEMENTATION says, or else the kernel where it can. See `implementations`.
        XLA computes what is not `train`.

    Returns:
      y, of the shape and dtype of x, and the new state (the same one if not `train`). Statistics
      are computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, `where` is not boolean, params is no NormParams, state
        is no BatchNormState, or `train` is traced.
      ValueError: an axis is out of range or given twice, a shape does not fit, x is a scalar,
        epsilon is negative, momentum is outside [0, 1], nothing binds `axis_name`, the virtual
        batch size does not divide the batch, or the kernel is asked for and can't run.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = jn.batch_norm(x, jn.init_batch_norm_state(2), momentum=0.9)
      >>> y.round(4)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> state.mean
      Array([0.2, 2. ], dtype=float32)
      >>> y, _ = jn.batch_norm(x, state, train=False)

    References:
      Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
      Internal Covariate Shift", 2015, arXiv:1502.03167.
      Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap in
      large batch training of neural networks", 2017, arXiv:1705.08741 (ghost batch norm).
    """
    x = check_input(x)
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"train must be a Python bool, got {type(train).__name__}; mark it as static in "
            "jax.jit, or bind it with functools.partial."
        )
    check_implementation(implementation)
    layout = batch_layout(x.shape, feature_axis, virtual_batch_size if train else None)
    state = _check_state(state, layout, x.dtype)
    if not train:
        y = normalize_with(x, layout, state.mean, state.var, params, epsilon=epsilon)
        return y, state
    devices = bound_devices(axis_name, axis_index_groups)
    y, stats = normalize(
        x,
        layout,
        params,
        epsilon=epsilon,
        where=where,
        devices=devices,
        implementation=implementation,
    )
    measured = stats.moments(layout, devices)
    return y, update_batch_norm_state(state, measured, momentum=momentum, ddof=ddof)


def update_batch_norm_state(
    state: BatchNormState,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.99,
    ddof: int = 0,
) -> BatchNormState:
    """The state moved towards the moments.

        new = momentum * old + (1 - momentum) * measured

    Args:
      state: the running statistics.
      moments: what was measured, of the same shape; features with count zero keep their state, if
        their mean and variance are finite.
      momentum: the weight that the old state keeps, in [0, 1]; None is the average of all updates.
      ddof: what to take from the count that divides the sum of squares: 1 is the unbiased
        estimate (where count > 1).

    Returns:
      A state of the same shapes and dtypes, its count one higher if anything counted.

    Raises:
      TypeError: state is no BatchNormState of float32 or better, or moments no Moments.
      ValueError: the shapes differ, momentum is outside [0, 1], or ddof is not a count.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> state = jn.init_batch_norm_state(1)
      >>> measured = jn.moments(jnp.array([[2.0], [4.0]]), axis=0)
      >>> jn.update_batch_norm_state(state, measured, momentum=0.5, ddof=1).var
      Array([1.5], dtype=float32)
    """
    _check_state_type(state)
    _check_running_dtype(jnp.result_type(state.mean), "state.mean")
    _check_running_dtype(jnp.result_type(state.var), "state.var")
    check_moments(moments)
    if jnp.shape(state.mean) != jnp.shape(moments.mean):
        raise ValueError(
            f"moments must have the shape of the state, {jnp.shape(state.mean)}, got "
            f"{jnp.shape(moments.mean)}; measure over all axes but the features'."
        )
    if not isinstance(ddof, int | np.integer) or ddof < 0:
        raise ValueError(f"ddof must be an integer of at least 0, got {ddof!r}; pass 0 or 1.")
    counted = moments.count > 0
    if momentum is None:
        updates = state.count.astype(state.var.dtype)
        keep, gain = updates / (updates + 1), 1 / (updates + 1)
    else:
        keep, gain = _check_momentum(momentum), 1 - momentum
    unbiased = moments.count / jnp.maximum(moments.count - int(ddof), 1)

    def move(old, measured):
        if jnp.iscomplexobj(measured):
            old = old.astype(promote(old.dtype, jnp.complex64))
        measured = measured.astype(old.dtype)
        kept, gained = jnp.where(counted, keep, 1), jnp.where(counted, gain, 0)
        return kept.astype(old.dtype) * old + gained.astype(old.dtype) * measured

    return BatchNormState(
        move(state.mean, moments.mean),
        move(state.var, moments.var * unbiased),
        state.count + jnp.any(counted).astype(state.count.dtype),
    )


def update_running_statistics(
    mean: jax.Array, var: jax.Array, moments: Moments, momentum: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The same for modules, which as Flax's keep no count of updates.

    And may keep them in half precision: that of the input, whose `dtype` they are promoted to.
    """
    if momentum is None:
        raise ValueError(
            "momentum must lie in [0, 1], got None; the average of all updates needs their count, "
            "which the state of jaxnorm.batch_norm has and Flax's variables have not."
        )
    wide_mean, wide_var = (a.astype(promote(a.dtype, jnp.float32)) for a in (mean, var))
    state = BatchNormState(wide_mean, wide_var, jnp.zeros((), jnp.int32))
    state = update_batch_norm_state(state, moments, momentum=momentum)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    return (
        state.mean.astype(promote(mean.dtype, dtype)),
        state.var.astype(promote(var.dtype, jnp.finfo(dtype).dtype)),
    )


def _check_state(state: BatchNormState, layout: Layout, dtype: jnp.dtype) -> BatchNormState:
    _check_state_type(state)
    mean = check_feature_array(state.mean, "state.mean", layout, dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"state.mean must be complex where x is, got {mean.dtype} for x of {dtype}; make it "
            "with jaxnorm.init_batch_norm_state(features, dtype)."
        )
    var = check_feature_array(state.var, "state.var", layout, dtype)
    return BatchNormState(mean, var, jnp.asarray(state.count))


def _check_state_type(state: BatchNormState) -> None:
    if not isinstance(state, BatchNormState):
        raise TypeError(
            f"state must be a BatchNormState, got {type(state).__name__}; start with "
            "jaxnorm.init_batch_norm_state(features)."
        )


def _check_running_dtype(dtype: jnp.dtype, name: str) -> None:
    if not jnp.issubdtype(dtype, jnp.inexact) or promote(dtype, jnp.float32) != dtype:
        raise TypeError(
            f"{name} must be float32 or better, got {dtype}; a running average moves by steps that "
            "smaller types round away, so keep it in float32."
        )


def _check_momentum(momentum: float | jax.Array) -> float | jax.Array:
    if not isinstance(momentum, Tracer | Real | jax.Array):
        raise TypeError(
            f"momentum must be a number or None, got {type(momentum).__name__}; pass for example "
            "momentum=0.99."
        )
    if not isinstance(momentum, Tracer) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1] or be None, got {momentum}; it is the weight that the "
            "old statistics keep, so PyTorch's momentum m is 1 - m here."
        )
    return momentum
