"""The door: arguments are checked, precision is decided, and who computes is chosen.

Behind it there are programs of a static `NormSpec` and of arrays. A call outside of `jit` is some
checks and one such program.
"""

import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import kernels
from jaxnorm.core import operations, primitives
from jaxnorm.core.arithmetic import as_array, promote, real_dtype, reciprocal_std
from jaxnorm.core.devices import LOCAL, Devices
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Moments, Statistics
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import (
    NormParams,
    apply_params,
    measure_and_standardize,
    standardize_by,
    undo_standardize,
)


class Arrays(NamedTuple):
    """The arrays of a norm, checked."""

    x: jax.Array
    params: NormParams
    where: jax.Array | None  # broadcasts against x
    residual: jax.Array | None = None  # like x


def program(function: Callable, static_argnums: tuple[int, ...] = (0,)) -> Callable:
    """Compile a function whose first argument is a `NormSpec`, unless `vmap` binds its devices."""
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(spec: NormSpec, *args: Any) -> Any:
        return (function if spec.devices.under_vmap else compiled)(spec, *args)

    return call


def checked(
    name: str,
    x: jax.Array,
    layout: Layout,
    params: NormParams | None = None,
    *,
    epsilon: float,
    where: ArrayLike | None = None,
    residual: jax.Array | None = None,
    scale_offset: float = 0.0,
    subtract_mean: bool = True,
    devices: Devices = LOCAL,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[NormSpec, Arrays]:
    """The arguments of a norm, checked.

    The arithmetic is in float32 or better; the result has `dtype`, by default that of x.
    """
    spec = make_spec(name, x, layout, epsilon, dtype)
    spec = spec._replace(
        subtract_mean=subtract_mean,
        scale_offset=check_scale_offset(scale_offset, params),
        adds=residual is not None,
        devices=devices,
        implementation=kernels.check_implementation(implementation),
    )
    arrays = Arrays(
        x,
        check_params(params, layout, spec.dtype),
        layout.mask(where),
        residual,
    )
    if spec.implementation != "xla":
        request = operations.request(spec, x.dtype, arrays.params, masked=where is not None)
        spec = spec._replace(params_apart=operations.can_be_apart(spec, request))
        if spec.params_apart:
            request = request._replace(param_blocks=1)
        if not kernels.supported(request, required=spec.implementation == "kernel"):
            spec = spec._replace(implementation="xla")
    return spec, arrays


def compute(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """y, the statistics and the total, inside a program: by a kernel if one supports it, or XLA."""
    x, params, where, residual = arrays
    with jax.named_scope(spec.name):
        if spec.implementation == "xla":
            return measure_and_standardize(spec, x, residual, params, where)
        if not spec.params_apart:
            return primitives.normalize(spec, x, residual, params)
        h, stats, total = primitives.normalize(spec, x, residual, NormParams())
        return apply_params(spec, h, x if total is None else total, stats, params), stats, total


@program
def normalize(spec: NormSpec, arrays: Arrays) -> jax.Array:
    """Standardize x by its own statistics."""
    return compute(spec, arrays)[0]


@program
def add_and_normalize(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Standardize x plus the residual; the second result is this total."""
    y, _, total = compute(spec, arrays)
    assert total is not None
    return y, total


@program
def normalize_and_measure(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, Moments]:
    """Standardize x by its own statistics; the second result is the moments, over the devices."""
    y, stats, _ = compute(spec, arrays)
    return y, stats.moments(spec.layout, spec.devices)


def normalize_with(
    name: str,
    x: jax.Array,
    layout: Layout,
    moments: tuple[ArrayLike, ArrayLike],
    params: NormParams | None = None,
    *,
    epsilon: float,
    scale_offset: float = 0.0,
    dtype: DTypeLike | None = None,
    inverse: bool = False,
) -> jax.Array:
    """Standardize x by a given mean and variance, such as running ones; or undo that."""
    spec = make_spec(name, x, layout, epsilon, dtype)
    spec = spec._replace(scale_offset=check_scale_offset(scale_offset, params))
    mean, var = (
        check_param(value, f"the {what}", layout, spec.dtype)
        for value, what in zip(moments, ("mean", "variance"), strict=True)
    )
    params = check_params(params, layout, spec.dtype)
    return _normalize_with(spec, inverse, x, mean, var, params)


@functools.partial(program, static_argnums=(0, 1))
def _normalize_with(spec, inverse, x, mean, var, params):
    with jax.named_scope(spec.name):
        mean = spec.layout.broadcast(mean).astype(spec.compute_dtype)
        var = spec.layout.broadcast(var).astype(real_dtype(spec.compute_dtype))
        rstd = reciprocal_std(var, spec.epsilon)
        if inverse:
            return undo_standardize(spec, x, mean, rstd, params)
        return standardize_by(spec, x, mean, None, rstd, params)


def make_spec(
    name: str,
    x: jax.Array,
    layout: Layout,
    epsilon: float = 0.0,
    dtype: DTypeLike | None = None,
) -> NormSpec:
    """The spec of a call without options: arithmetic in float32 or better, a result like x."""
    dtype = jnp.dtype(dtype or x.dtype)
    compute_dtype = promote(x.dtype, dtype, jnp.float32)
    return NormSpec(name, layout, compute_dtype, dtype, check_epsilon(epsilon))


def check_input(x: Any, name: str = "x") -> jax.Array:
    """x as an array of a dtype that can be normalized."""
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating-point or complex, got dtype {x.dtype}; convert it first, for "
            f"example {name}.astype(jnp.float32)."
        )
    return x


def check_train(train: bool) -> bool:
    """Whether to train as a Python bool; it decides what is computed."""
    if not isinstance(train, bool | np.bool_):
        raise TypeError(
            f"train must be a Python bool, got {type(train).__name__}; mark it as static in "
            "jax.jit, or bind it with functools.partial."
        )
    return bool(train)


def check_residual(residual: Any, x: jax.Array) -> jax.Array:
    """The residual as an array like x."""
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
    """Parameters whose arrays fit the layout; None is no parameters."""
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


def add_params(
    learned: NormParams, given: NormParams, layout: Layout, dtype: jnp.dtype
) -> NormParams:
    """The sum of two scales and of two biases, in float32 or better; None is no summand."""

    def add(name, a, b):
        if b is None:
            return a
        b = check_param(b, name, layout, dtype)
        if a is None:
            return b
        wide = promote(a.dtype, b.dtype, jnp.float32)
        return layout.broadcast(a).astype(wide) + layout.broadcast(b).astype(wide)

    return NormParams(*map(add, NormParams._fields, learned, given))


def check_feature_array(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """An array with one element for each feature of the layout, real if x is."""
    value = as_array(value)
    if value.shape != layout.feature_shape:
        raise ValueError(
            f"{name} must have shape {layout.feature_shape} to fit x of shape {layout.shape}, got "
            f"{value.shape}; make it with that many features, or give x another feature axis."
        )
    return _real_if(value, name, dtype)


def check_param(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """An array of the shape of the features or that broadcasts to x by its rank, real if x is."""
    value = as_array(value)
    fits = value.ndim == len(layout.shape) and all(
        size in (1, full) for size, full in zip(value.shape, layout.shape, strict=True)
    )
    if value.shape != layout.feature_shape and not fits:
        raise ValueError(
            f"{name} must have shape {layout.feature_shape}, or {len(layout.shape)} axes of size 1 "
            f"or as in x, to fit x of shape {layout.shape}, got {value.shape}; make it with that "
            "many features, or insert axes of size 1."
        )
    return _real_if(value, name, dtype)


def _real_if(value: jax.Array, name: str, dtype: jnp.dtype) -> jax.Array:
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real where the result is, got {value.dtype} for a result of {dtype}; "
            "make x complex or take the real part."
        )
    return value


def check_scalar_or_features(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """A number, which may be traced, or an array with one element for each feature."""
    value = as_array(value)
    if value.ndim:
        return check_feature_array(value, name, layout, dtype)
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real where the result is, got {value.dtype} for a result of {dtype}; "
            "take the real part."
        )
    return value


def check_real(x: jax.Array, name: str) -> None:
    """Check that x is not complex."""
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"x must be real for {name}, got dtype {x.dtype}; pass the real and the imaginary part "
            "as features of their own."
        )


def check_epsilon(epsilon: float) -> float:
    """Epsilon as a Python float; it is compiled in."""
    epsilon = check_number(epsilon, "epsilon")
    if not epsilon >= 0:
        raise ValueError(
            f"epsilon must be at least 0, got {epsilon}; it keeps a divisor from zero."
        )
    return epsilon


def check_scale_offset(offset: float, params: NormParams | None) -> float:
    """The offset as a Python float; there must be a scale to add it to."""
    offset = check_number(offset, "scale_offset")
    if not math.isfinite(offset):
        raise ValueError(f"scale_offset must be finite, got {offset}; it is added to the scale.")
    if offset and getattr(params, "scale", None) is None:
        raise ValueError(
            f"scale_offset must be added to a scale, got {offset} and no scale; give params a "
            "scale, or leave scale_offset out."
        )
    return offset


def check_number(value: float, name: str) -> float:
    """A number as a Python float; it is compiled in."""
    number = isinstance(value, Real) or (isinstance(value, jax.Array) and value.ndim == 0)
    if isinstance(value, Tracer) or not number:
        raise TypeError(
            f"{name} must be a number that is known while tracing, got {type(value).__name__}; "
            "it is compiled into the program, so bind it with functools.partial."
        )
    return float(value)
