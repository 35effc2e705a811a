"""Batch normalization: statistics of each feature over the whole batch, and over devices."""

import functools

import jax
from jax.typing import ArrayLike

from jaxnorm.core.arguments import check_input, check_mean_and_variance, check_train
from jaxnorm.core.axes import Axes
from jaxnorm.core.devices import LOCAL, AxisGroups, AxisName, bound_devices
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.norm import norm, prepare_call, program
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.renorm import Renorm, check_renorm, normalize_batch, without_kernel
from jaxnorm.functional.state import (
    BatchNormState,
    check_ddof,
    check_running_dtypes,
    check_state,
    check_weights,
    updated_state,
)


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
    scale_offset: float = 0.0,
    renorm: Renorm | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, BatchNormState]:
    """Apply batch normalization: zero mean and unit variance for each feature over the batch.

        y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias

    In training, mean and variance are measured over all axes of x but the features', and over the
    devices of `axis_name`; they update the state. Otherwise they are taken from the state.

    Batch renormalization corrects them towards the state as it was before (S):

        y = ((x - mean) / sqrt(var + epsilon) * r + d) * scale + bias
        r = clip(sqrt((var + epsilon) / (S.var + epsilon)), 1 / r_max, r_max)
        d = clip((mean - S.mean) / sqrt(S.var + epsilon), -d_max, d_max)

    No gradient flows through r and d.

    Args:
      x: array of any shape with at least one axis; floating-point or complex.
      state: the running statistics, of shape (features,).
      axis_name: a name or a tuple of names, bound by `jax.shard_map`, `jax.pmap` or `jax.vmap`,
        over which statistics are shared; None inside such a map means local statistics. Under
        plain `jax.jit` statistics are global without it, however x is sharded.
      params: scale and bias, each of shape (features,), or of the rank of x with each axis of size
        1 or as in x (one for each example, say), or None.
      train: whether to measure x and update the state; a Python bool.
      momentum: the weight of the old state, in [0, 1]; None: the cumulative average; one count
        serves all features.
      epsilon: added to the variance; in units of x squared.
      feature_axis: the axis of the features, or several; state and params then have their shape,
        in the order of x.
      where: boolean, broadcastable to x: True counts in the statistics. Every position is
        standardized, so that y is NaN where x is. A NaN that does not count leaves the gradients
        as they are with any number in its place, if the loss leaves out that position. A feature
        in which nothing counts becomes its bias and keeps its state.
      axis_index_groups: lists of indices along `axis_name` that share statistics; None is all.
      ddof: 1 divides the running variance by count - 1, as PyTorch does; y is not affected.
      virtual_batch_size: ghost batch norm: each run of this many examples shares statistics, on
        each device separately. The examples are the first axis that holds no features. The state
        moves towards the moments of the whole batch, over all devices of `axis_name`.
      scale_offset: added to the scale, in float32 or better. With 1, a scale of zeros changes
        nothing.
      renorm: the limits r_max and d_max of batch renormalization, which may be traced; None is
        batch norm, and so is Renorm(1, 0). For complex x, d_max limits the absolute value of d.
        Without `train` it has no effect.
      implementation: "kernel" for the platform's kernel, "xla" for XLA. None: the environment
        variable JAXNORM_IMPLEMENTATION if set, else the kernel if it supports the input, else XLA.
        See `implementations`. Without `train`, or with renorm, XLA computes it.

    Returns:
      y, of the shape and dtype of x, and the new state (the same one if not `train`). Statistics
      are computed in float32 or better.

    Raises:
      TypeError: x is of an integer type, `where` is not boolean, params is not a NormParams, state
        is not a BatchNormState, renorm is not a Renorm, or `train` is traced.
      ValueError: an axis is out of range or given twice, a shape does not fit, x is a scalar,
        epsilon is negative, there is an offset and no scale, momentum is outside [0, 1], nothing
        binds `axis_name` (also a NameError), the virtual batch size does not divide the batch,
        r_max is below 1, d_max is below 0, or `implementation="kernel"` can't run.

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
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
      Models", 2017, arXiv:1702.03275. It averages standard deviations; our state has the variance.
    """
    x = check_input(x)
    train = check_train(train)
    layout = batch_layout(x.shape, feature_axis, virtual_batch_size if train else None)
    state = check_state(state, layout, x.dtype)
    renorm = check_renorm(renorm)
    if isinstance(axis_name, NormParams):
        raise TypeError(
            "axis_name must be a name or a tuple of names, got a NormParams; pass params by "
            "keyword: batch_norm(x, state, params=params)."
        )
    # Check in evaluation too, so that a wrong argument is an error before training.
    spec, arrays = prepare_call(
        "batch_norm",
        x,
        layout,
        params,
        epsilon=epsilon,
        where=where,
        scale_offset=scale_offset,
        devices=bound_devices(axis_name, axis_index_groups),
        implementation=without_kernel(renorm, implementation),
    )
    ddof, weights = check_ddof(ddof), check_weights(momentum)
    if not train:
        moments = check_mean_and_variance(state[:2], layout, spec.dtype)
        spec = spec._replace(devices=LOCAL, implementation="xla")
        return norm(spec, arrays._replace(moments=moments)), state
    check_running_dtypes(state)
    return _train(spec, ddof, arrays, state, weights, renorm)


@functools.partial(program, static_argnums=(0, 1))
def _train(spec, ddof, arrays, state, weights, renorm):
    y, moments = normalize_batch(spec, arrays, state.mean, state.var, renorm)
    return y, updated_state(state, moments, weights, ddof)
