"""The door: arguments checked, precision decided, and who computes it chosen."""

import functools
from numbers import Real

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core import primitives
from jaxnorm.core.devices import HERE, Devices
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Measure, Statistics, promote, reciprocal_std
from jaxnorm.core.standardize import NormParams, standardize


def normalize(
    x: jax.Array,
    layout: Layout,
    params: NormParams | None = None,
    *,
    epsilon: float,
    where: ArrayLike | None = None,
    centred: bool = True,
    devices: Devices = HERE,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Statistics]:
    """Standardize x by its own statistics; return those too.

    Sub-batches share theirs with no other device.
    Precision is decided here: the arithmetic is in float32 or better, the result in `dtype`, by
    default that of x.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    arithmetic = promote(x.dtype, dtype, jnp.float32)
    devices = HERE if layout.sub_batches else devices
    how = Measure(layout, arithmetic, check_epsilon(epsilon), centred, devices)
    params, where = check_params(params, layout, dtype), layout.mask(where)
    return primitives.normalize(how, dtype, x, params, where, implementation)


def normalize_with(
    x: jax.Array,
    layout: Layout,
    mean: jax.Array,
    var: jax.Array,
    params: NormParams | None = None,
    *,
    epsilon: float,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Standardize x by statistics that are given, such as running ones."""
    dtype = jnp.dtype(dtype or x.dtype)
    how = Measure(layout, promote(x.dtype, dtype, jnp.float32), check_epsilon(epsilon))
    mean = check_feature_array(mean, "the running mean", layout, dtype)
    var = check_feature_array(var, "the running variance", layout, dtype)
    return _normalize_with(how, dtype, x, mean, var, check_params(params, layout, dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalize_with(how, dtype, x, mean, var, params):
    real = jnp.finfo(how.dtype).dtype
    mean = how.layout.spread(mean).astype(how.dtype)
    rstd = reciprocal_std(how.layout.spread(var).astype(real), how.epsilon)
    return standardize(how, dtype, x, mean, None, rstd, params)


def check_params(params: NormParams | None, layout: Layout, dtype: jnp.dtype) -> NormParams:
    """Params whose arrays fit the layout."""
    if params is None:
        return NormParams()
    if not isinstance(params, NormParams):
        raise TypeError(
            "params must be a NormParams or None, got "
            f"{type(params).__name__}; write jaxnorm.NormParams(scale=..., bias=...)."
        )
    return NormParams(
        *(
            None if value is None else check_feature_array(value, name, layout, dtype)
            for name, value in zip(params._fields, params, strict=True)
        )
    )


def check_feature_array(value, name: str, layout: Layout, dtype: jnp.dtype) -> jax.Array:
    """An array with one element for each feature of the layout, real if x is."""
    value = jnp.asarray(value)
    if value.shape != layout.affine_shape:
        raise ValueError(
            f"{name} must have shape {layout.affine_shape} to fit x of shape {layout.shape}, got "
            f"{value.shape}; make it with that many features, or give x another feature axis."
        )
    if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real where the result is, got {value.dtype} for a result of {dtype}; "
            "make x complex or take the real part."
        )
    return value


def check_epsilon(epsilon: float) -> float:
    """Epsilon as a Python float; it is compiled in."""
    if isinstance(epsilon, Tracer) or not isinstance(epsilon, Real | jax.Array):
        raise TypeError(
            f"epsilon must be a number that is known while tracing, got {type(epsilon).__name__}; "
            "it is compiled into the program, so bind it with functools.partial."
        )
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}; it is added to the variance.")
    return float(epsilon)
