"""The door: arguments are checked, precision is decided, and who computes is chosen.

Behind it there are programs of a static `NormSpec` and of arrays. A call outside of `jit` is some
checks and one such program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm import kernels
from jaxnorm.core import operations, primitives
from jaxnorm.core.arguments import check_epsilon, check_param, check_params, check_scale_offset
from jaxnorm.core.arithmetic import promote, real_dtype, reciprocal_std
from jaxnorm.core.devices import LOCAL, Devices
from jaxnorm.core.exporting import exporter_traces, jit
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Moments, Statistics
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import (
    NormParams,
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
    compiled = jit(function, static_argnums)

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
    if implementation is None and exporter_traces():
        implementation = "xla"  # no exporter has our primitives
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
        if not kernels.supported(request, required=spec.implementation == "kernel"):
            spec = spec._replace(implementation="xla")
    return spec, arrays


def compute(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """y, the statistics and the total, inside a program: by a kernel if one supports it, or XLA."""
    x, params, where, residual = arrays
    with jax.named_scope(spec.name):
        if spec.implementation == "xla":
            return measure_and_standardize(spec, x, residual, params, where)
        return primitives.normalize(spec, x, residual, params)


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
    where: ArrayLike | None = None,
    inverse: bool = False,
) -> jax.Array:
    """Standardize x by a given mean and variance, such as running ones; or undo that.

    What `where` leaves out may be NaN, and does not reach the gradients.
    """
    spec = make_spec(name, x, layout, epsilon, dtype)
    spec = spec._replace(scale_offset=check_scale_offset(scale_offset, params))
    mean, var = (
        check_param(value, f"the {what}", layout, spec.dtype)
        for value, what in zip(moments, ("mean", "variance"), strict=True)
    )
    if jnp.iscomplexobj(var):
        raise TypeError(f"the variance must be real, got {var.dtype}; take its real part.")
    params = check_params(params, layout, spec.dtype)
    return _normalize_with(spec, inverse, x, mean, var, params, layout.mask(where))


@functools.partial(program, static_argnums=(0, 1))
def _normalize_with(spec, inverse, x, mean, var, params, where):
    with jax.named_scope(spec.name):
        mean = spec.layout.broadcast(mean).astype(spec.compute_dtype)
        var = spec.layout.broadcast(var).astype(real_dtype(spec.compute_dtype))
        rstd = reciprocal_std(var, spec.epsilon)
        if inverse:
            return undo_standardize(spec, x, mean, rstd, params)
        apply = lambda x: standardize_by(spec, x, mean, None, rstd, params)
        if where is None:
            return apply(x)
        y = lax.stop_gradient(apply(x))
        lost = ~(where | jnp.isfinite(y))
        return jnp.where(lost, y, apply(jnp.where(lost, 0, x)))


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
