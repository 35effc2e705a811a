"""Entry point: check the arguments of a norm, choose its precision and implementation, compute it.

`prepare_call` checks; `norm` and the functions beside it are compiled programs of a static
`NormSpec` and of arrays. Outside of `jit`, a call costs the checks and one such program.
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
from jaxnorm.core.arguments import (
    check_epsilon,
    check_mean_and_variance,
    check_params,
    check_scale_offset,
)
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
    moments: tuple[jax.Array, jax.Array] | None = None  # mean and variance that are given


def program(function: Callable, static_argnums: tuple[int, ...] = (0,)) -> Callable:
    """Compile a function whose first argument is a `NormSpec`, unless `vmap` binds its devices."""
    compiled = jit(function, static_argnums)

    @functools.wraps(function)
    def call(spec: NormSpec, *args: Any) -> Any:
        return (function if spec.devices.under_vmap else compiled)(spec, *args)

    return call


def prepare_call(
    name: str,
    x: jax.Array,
    layout: Layout,
    params: NormParams | None = None,
    *,
    epsilon: float,
    where: ArrayLike | None = None,
    residual: jax.Array | None = None,
    moments: tuple[ArrayLike, ArrayLike] | None = None,
    scale_offset: float = 0.0,
    subtract_mean: bool = True,
    devices: Devices = LOCAL,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[NormSpec, Arrays]:
    """Check the arguments of a norm, and return its static part and its arrays.

    The arithmetic is in float32 or better; the result has `dtype`, by default that of x. With
    `moments`, such as running statistics, XLA computes the norm.
    """
    spec = make_spec(name, x, layout, epsilon, dtype)
    if implementation is None and (moments is not None or exporter_traces()):
        implementation = "xla"  # no exporter has our primitives
    spec = spec._replace(
        subtract_mean=subtract_mean,
        scale_offset=check_scale_offset(scale_offset, params),
        has_residual=residual is not None,
        devices=devices,
        implementation=kernels.check_implementation(implementation),
    )
    if moments is not None:
        moments = check_mean_and_variance(moments, layout, spec.dtype)
    params = check_params(params, layout, spec.dtype)
    arrays = Arrays(x, params, layout.mask(where), residual, moments)
    if spec.implementation != "xla":
        request = operations.request(spec, x.dtype, arrays.params, masked=where is not None)
        if not kernels.supported(request, required=spec.implementation == "kernel"):
            spec = spec._replace(implementation="xla")
    return spec, arrays


def make_spec(
    name: str,
    x: jax.Array,
    layout: Layout,
    epsilon: float = 0.0,
    dtype: DTypeLike | None = None,
) -> NormSpec:
    """Make the spec of a call without options: arithmetic in float32 or better, a result like x."""
    dtype = jnp.dtype(dtype or x.dtype)
    compute_dtype = promote(x.dtype, dtype, jnp.float32)
    return NormSpec(name, layout, compute_dtype, dtype, check_epsilon(epsilon))


@program
def norm(spec: NormSpec, arrays: Arrays) -> jax.Array:
    """Standardize x by its own statistics, or by the moments that are given."""
    return _compute(spec, arrays)[0] if arrays.moments is None else _by_moments(spec, arrays)


@program
def norm_of_sum(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Standardize x plus the residual; return this sum too."""
    y, _, residual_sum = _compute(spec, arrays)
    assert residual_sum is not None
    return y, residual_sum


@program
def norm_and_moments(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, Moments]:
    """Standardize x by its own statistics; return their moments too, over the devices."""
    y, stats, _ = _compute(spec, arrays)
    return y, stats.moments(spec.layout, spec.devices)


@program
def inverse_norm(spec: NormSpec, arrays: Arrays) -> jax.Array:
    """Undo `norm` by the moments that are given: x is y."""
    with jax.named_scope(spec.name):
        return undo_standardize(spec, arrays.x, *_mean_and_rstd(spec, arrays), arrays.params)


def _compute(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """y, the statistics and the residual sum; by a kernel where one supports it, else by XLA."""
    x, params, where, residual, _ = arrays
    with jax.named_scope(spec.name):
        if spec.implementation == "xla":
            return measure_and_standardize(spec, x, residual, params, where)
        return primitives.norm_by_primitives(spec, x, residual, params)


def _by_moments(spec: NormSpec, arrays: Arrays) -> jax.Array:
    """y by the given moments. What `where` leaves out may be NaN, and no gradient gets it."""
    x, params, where, *_ = arrays
    with jax.named_scope(spec.name):
        mean, rstd = _mean_and_rstd(spec, arrays)
        apply = lambda x: standardize_by(spec, x, mean, None, rstd, params)
        if where is None:
            return apply(x)
        y = lax.stop_gradient(apply(x))
        lost = ~(where | jnp.isfinite(y))
        return jnp.where(lost, y, apply(jnp.where(lost, 0, x)))


def _mean_and_rstd(spec: NormSpec, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    assert arrays.moments is not None
    mean, var = map(spec.layout.broadcast, arrays.moments)
    var = var.astype(real_dtype(spec.compute_dtype))
    return mean.astype(spec.compute_dtype), reciprocal_std(var, spec.epsilon)
