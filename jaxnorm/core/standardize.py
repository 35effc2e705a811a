"""The equation of every norm: y = (x - mean) * rstd * scale + bias.

With the derivative of the statistics defined (moments.py), JAX differentiates it from here. The
only thing said about that is what to keep for the backward pass: x in its own dtype and the
statistics, never the standardized x, which is computed again.
"""

import functools
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxnorm.core.devices import HERE, Devices
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Measure, Statistics, centre, measure, promote, reciprocal_std


class NormParams(NamedTuple):
    """The affine of a norm: y = standardized x * scale + bias, each of them optional.

    Attributes:
      scale: the factor, or None for one. Also called gamma or weight.
      bias: the summand, or None for zero. Also called beta.
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


def init_params(
    features: int | tuple[int, ...],
    *,
    scale: bool = True,
    bias: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> NormParams:
    """Parameters that leave the standardized x as it is: scale one, bias zero.

    Args:
      features: the number of features, or the shape of the axes that are normalized.
      scale: whether there is a scale.
      bias: whether there is a bias.
      dtype: of both.

    Examples:
      >>> import jaxnorm as jn
      >>> jn.init_params(3)
      NormParams(scale=Array([1., 1., 1.], dtype=float32), bias=Array([0., 0., 0.], dtype=float32))
      >>> jn.init_params((4, 5), bias=False).scale.shape
      (4, 5)
    """
    return NormParams(
        jnp.ones(features, dtype) if scale else None,
        jnp.zeros(features, dtype) if bias else None,
    )


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
    function = _normalize if devices.mapped else _normalize_compiled
    return function(how, dtype, x, check_params(params, layout, dtype), layout.mask(where))


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


def _normalize(how, dtype, x, params, where):
    stats = measure(how, x, where)
    return _standardize(how, dtype, x, stats.mean, stats.rest, stats.rstd, params), stats


_normalize_compiled = jax.jit(_normalize, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normalize_with(how, dtype, x, mean, var, params):
    real = jnp.finfo(how.dtype).dtype
    mean = how.layout.spread(mean).astype(how.dtype)
    rstd = reciprocal_std(how.layout.spread(var).astype(real), how.epsilon)
    return _standardize(how, dtype, x, mean, None, rstd, params)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _standardize(how, dtype, x, mean, rest, rstd, params):
    y = centre(how.prepare(x), mean, rest) * rstd.astype(how.dtype)
    if params.scale is not None:
        y = y * how.layout.spread(params.scale).astype(how.dtype)
    if params.bias is not None:
        y = y + how.layout.spread(params.bias).astype(how.dtype)
    return y.reshape(how.layout.shape).astype(dtype)


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
