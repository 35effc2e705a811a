"""Checks of the arguments of norms. An error is one sentence, raised before any computation."""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxnorm.core.arithmetic import as_array, is_small_float
from jaxnorm.core.layout import Layout
from jaxnorm.core.standardize import NormParams


def check_input(x: Any, name: str = "x") -> jax.Array:
    """Return x as an array, of a dtype that can be normalized."""
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating-point or complex, got dtype {x.dtype}; convert it first, for "
            f"example {name}.astype(jnp.float32)."
        )
    check_dtype(x.dtype, name, f"convert it first, for example {name}.astype(jnp.float32).")
    return x


def check_dtype(dtype: jnp.dtype, name: str, remedy: str) -> None:
    """Check that JAX promotes a dtype to float32."""
    if is_small_float(dtype):
        raise TypeError(f"{name} must be of float16, bfloat16 or better, got {dtype}; {remedy}")


def check_train(train: Any, name: str = "train") -> bool:
    """Return a flag such as `train` as a Python bool; it must not be traced."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"{name} must be a Python bool, got {type(train).__name__}; mark it as static in "
            "jax.jit, or bind it with functools.partial."
        )
    return bool(train)


def check_flag(flag: Any, name: str) -> bool:
    """Return a flag of a module as a Python bool; as in Flax, it may be any untraced value."""
    return check_train(flag, name) if isinstance(flag, Tracer) else bool(flag)


def check_residual(residual: Any, x: jax.Array) -> jax.Array:
    """Return the residual as an array, of the shape and dtype of x."""
    if residual is None:
        raise TypeError(
            "residual must be an array like x, got None; without one, call layer_norm or rms_norm."
        )
    residual = as_array(residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x, {x.shape}, got {residual.shape}; broadcast it "
            "first, for example with jnp.broadcast_to."
        )
    if residual.dtype != x.dtype:
        raise TypeError(
            f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}; convert one of "
            "the two first, for example residual.astype(x.dtype)."
        )
    return residual


def check_params(params: NormParams | None, layout: Layout, dtype: jnp.dtype) -> NormParams:
    """Return parameters whose arrays fit the layout; None means no parameters."""
    if params is None:
        return NormParams()
    if not isinstance(params, NormParams):
        raise TypeError(
            "params must be a NormParams or None, got "
            f"{type(params).__name__}; write jaxnorm.NormParams(scale=..., bias=...)."
        )
    return NormParams(
        *(
            None if value is None else check_param(value, name, layout, dtype)
            for name, value in zip(params._fields, params, strict=True)
        )
    )


def check_feature_array(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """Return an array with one element for each feature of the layout, real if x is."""
    return _real_if(check_feature_shape(value, name, layout), name, dtype)


def check_feature_shape(value, name: str, layout: Layout) -> jax.Array:
    """Return an array with one element for each feature of the layout."""
    value = as_array(value)
    if value.shape != layout.feature_shape:
        raise ValueError(
            f"{name} must have shape {layout.feature_shape} to fit x of shape {layout.shape}, got "
            f"{value.shape}; {_features_elsewhere(value, layout)}make it with that many features, "
            "or give x another feature axis."
        )
    return value


def _features_elsewhere(value: jax.Array, layout: Layout) -> str:
    """Suggest another feature axis, if one axis of x has as many elements as the value.

    The first axis holds examples, unless statistics are taken over it.
    """
    axes = [
        axis
        for axis, size in enumerate(layout.shape)
        if (size,) == value.shape
        and axis not in layout.feature_axes
        and (axis > 0 or 0 in layout.reduction_axes)
    ]
    if not axes or not layout.arguments:
        return ""
    # Axis 0 is the batch more often than the features.
    axis = min(axes, key=lambda axis: axis or len(layout.shape))
    passed = ", ".join(f"{argument}={axis}" for argument in layout.arguments)
    return f"if the features are axis {axis} of x, pass {passed}; else "


def check_param(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """Return an array of the shape of the features, or of the rank of x, real if x is."""
    value = as_array(value)
    fits = value.ndim == len(layout.shape) and all(
        size in (1, full) for size, full in zip(value.shape, layout.shape, strict=True)
    )
    if value.shape != layout.feature_shape and not fits:
        raise ValueError(
            f"{name} must have shape {layout.feature_shape}, that of the features of x of shape "
            f"{layout.shape}, got {value.shape}; {_features_elsewhere(value, layout)}make it with "
            "that many features, choose another feature axis of x, or give it as many axes as x "
            "has, each of size 1 or as in x."
        )
    return _real_if(value, name, dtype)


def check_mean_and_variance(
    moments: tuple[Any, Any], layout: Layout, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Return a mean and a real variance, whose shapes fit as in `check_param`."""
    mean, var = (
        check_param(value, f"the {what}", layout, dtype)
        for value, what in zip(moments, ("mean", "variance"), strict=True)
    )
    if jnp.iscomplexobj(var):
        raise TypeError(f"the variance must be real, got {var.dtype}; take its real part.")
    return mean, var


def _real_if(value: jax.Array, name: str, dtype: jnp.dtype) -> jax.Array:
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real where the result is, got {value.dtype} for a result of {dtype}; "
            "make x complex or take the real part."
        )
    return value


def check_scalar_or_features(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """Return a number, which may be traced, or an array with one element for each feature."""
    if value is None or isinstance(value, NormParams):
        raise TypeError(
            f"{name} must be a number or an array, got {type(value).__name__}; pass for example "
            f"{name}=0.5."
        )
    value = as_array(value)
    if value.ndim:
        return check_feature_array(value, name, layout, dtype)
    return _real_if(value, name, dtype)


def check_real(x: jax.Array, name: str) -> None:
    """Check that x is not complex."""
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"x must be real for {name}, got dtype {x.dtype}; pass the real and the imaginary part "
            "as features of their own."
        )


def check_epsilon(epsilon: float) -> float:
    """Return epsilon as a Python float; it is a constant of the program."""
    epsilon = check_number(epsilon, "epsilon")
    if not epsilon >= 0:
        raise ValueError(
            f"epsilon must be at least 0, got {epsilon}; it keeps a divisor from zero."
        )
    return epsilon


def check_scale_offset(offset: float, params: NormParams | None) -> float:
    """Return the offset as a Python float; it requires a scale."""
    offset = check_number(offset, "scale_offset")
    if not math.isfinite(offset):
        raise ValueError(f"scale_offset must be finite, got {offset}; it is added to the scale.")
    if offset and getattr(params, "scale", None) is None:
        raise ValueError(
            f"scale_offset must be added to a scale, got {offset} and no scale; give one, in "
            "params or to the call of a module, or leave scale_offset out."
        )
    return offset


def check_number(value: float, name: str) -> float:
    """Return a number as a Python float; it is a constant of the program."""
    if isinstance(value, Tracer) or not is_number(value):
        raise TypeError(
            f"{name} must be a number that is known while tracing, got {type(value).__name__}; "
            "it is compiled into the program, so bind it with functools.partial."
        )
    return float(value)


def is_number(value: Any) -> bool:
    """Return whether this is a real number of Python, NumPy or JAX; it may be traced."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
        return real and value.ndim == 0
    return isinstance(value, Real)
