"""A batch norm in evaluation, folded into the layer before it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.core.arguments import (
    check_feature_array,
    check_input,
    check_params,
    check_scale_offset,
)
from jaxnorm.core.axes import Axes, canonical_axes
from jaxnorm.core.layout import Layout
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.norm import norm, prepare_call
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.state import BatchNormState, check_state


def fold_batch_norm(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    state: BatchNormState,
    params: NormParams | None = None,
    *,
    epsilon: float = 1e-5,
    scale_offset: float = 0.0,
    output_axis: Axes = -1,
) -> tuple[jax.Array, jax.Array]:
    """Fold a batch norm into the dense layer or convolution before it.

        factor = (scale_offset + scale) / sqrt(var + epsilon)
        kernel = kernel * factor
        bias = (bias - mean) * factor + params.bias

    The new layer computes the old layer followed by `batch_norm(..., train=False)`, and saves a
    pass over the output. There must be no operation between the two, and no further training.

    Args:
      kernel: array whose axis `output_axis` holds the outputs: (in, out) of a dense layer,
        (height, width, in, out) of a convolution, with in divided by the groups if there are any,
        as Flax has it; floating-point or complex.
      bias: of the layer, of shape (out,), or None for zero.
      state: the running statistics, of shape (out,).
      params: scale and bias of the norm, each of shape (out,), or None.
      epsilon: of the norm.
      scale_offset: of the norm.
      output_axis: the axis of the outputs, or several, which the arrays of the norm then have too:
        -2 for a transposed convolution of shape (height, width, out, in), (-2, -1) for the
        depthwise kernel (height, width, in, multiplier) of Keras.

    Returns:
      The new kernel, of the dtype of `kernel`, and the new bias, of the dtype of `bias`, or of
      `kernel` if bias is None. Both are computed in float32 or better and rounded once. In half
      precision that rounding differs from that of the two layers.

    Raises:
      TypeError: kernel or bias is of an integer type, state is not a BatchNormState, params is not
        a NormParams, or an array of the norm is complex and the layer is not.
      ValueError: a shape does not fit, an axis is out of range or given twice, epsilon is
        negative, or there is an offset and no scale.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> x, kernel = jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.5, 2.0], [3.0, 1.0, 0.0]])
      >>> mean, var = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 1.0, 0.25])
      >>> state = jn.BatchNormState(mean, var, jnp.int32(10))
      >>> y, _ = jn.batch_norm(x @ kernel, state, train=False)
      >>> kernel, bias = jn.fold_batch_norm(kernel, None, state)
      >>> jnp.allclose(x @ kernel + bias, y)
      Array(True, dtype=bool)

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877 (section 3.2).
    """
    kernel = check_input(kernel, "kernel")
    layout = batch_layout(kernel.shape, canonical_axes(output_axis, kernel.ndim, "output_axis"))
    shape = layout.feature_shape
    bias = jnp.zeros(shape, kernel.dtype) if bias is None else check_input(bias, "bias")
    _check_shape(bias, "bias", layout)
    for name in ("mean", "var"):
        _check_shape(getattr(state, name, bias), f"state.{name}", layout)
    state = check_state(state, layout, kernel.dtype)
    check_scale_offset(scale_offset, params)
    for name, value in check_params(params, layout, kernel.dtype)._asdict().items():
        if value is not None:  # check_params also accepts the rank of the kernel
            check_feature_array(value, f"params.{name}", layout, kernel.dtype)
    # Normalize the bias, and the kernel with the factor of the norm alone.
    outputs = batch_layout(shape, tuple(range(len(shape))))
    scale = None if params is None else params.scale
    centred = jnp.zeros_like(state.mean), state.var
    prepare = functools.partial(prepare_call, "fold", epsilon=epsilon, scale_offset=scale_offset)
    return (
        norm(*prepare(kernel, layout, NormParams(scale), moments=centred)),
        norm(*prepare(bias, outputs, params, moments=state[:2])),
    )


def _check_shape(value: ArrayLike, name: str, layout: Layout) -> None:
    if np.shape(value) != layout.feature_shape:
        raise ValueError(
            f"{name} must have shape {layout.feature_shape}, that of the outputs of a kernel of "
            f"shape {layout.shape}, got {np.shape(value)}; pass the norm that follows this layer, "
            "or another output_axis."
        )
