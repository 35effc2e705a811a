"""Batch renormalization: batch norm corrected towards the running statistics."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.core import Tracer

from jaxnorm.core.arguments import check_feature_array, is_number
from jaxnorm.core.arithmetic import as_array, promote, real_dtype
from jaxnorm.core.moments import Moments, Statistics
from jaxnorm.core.norm import Arrays, norm_and_moments, program
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams, effective_scale, standardize_measured
from jaxnorm.core.statistics import statistics
from jaxnorm.kernels import KernelUnavailableError, check_implementation


@functools.partial(export.register_namedtuple_serialization, serialized_name="jaxnorm.Renorm")
class Renorm(NamedTuple):
    """Limits of the correction that batch renormalization makes.

    Both limits are scalars. They may be traced, so that a schedule needs one program; then nothing
    checks that they are at least 1 and 0. Renorm(1, 0)
    corrects nothing; Renorm(inf, inf) standardizes by the running statistics, but with the gradient
    of batch norm. The paper starts with (1, 0) and ends with (3, 5).

    Attributes:
      r_max: of the scale: r lies in [1 / r_max, r_max]; at least 1.
      d_max: of the shift, in standard deviations: d lies in [-d_max, d_max]; at least 0.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm as jn
      >>> @jax.jit
      ... def step(x, state, count):
      ...     t = jnp.clip(count / 1000, 0, 1)
      ...     return jn.batch_norm(x, state, renorm=jn.Renorm(1 + 2 * t, 5 * t))
      >>> y, state = step(jnp.ones((8, 3)), jn.init_batch_norm_state(3), 500)
      >>> y[0].round(4)
      Array([1., 1., 1.], dtype=float32)
    """

    r_max: float | jax.Array
    d_max: float | jax.Array


def check_renorm(renorm: Renorm | None) -> Renorm | None:
    """Return the limits, or None if they are the numbers 1 and 0, which correct nothing.

    Limits that are not traced become Python numbers.
    """
    if renorm is None:
        return None
    if not isinstance(renorm, Renorm):
        raise TypeError(
            f"renorm must be a Renorm or None, got {type(renorm).__name__}; write "
            "jaxnorm.Renorm(r_max=3.0, d_max=5.0)."
        )
    limits = Renorm(_check_limit("r_max", renorm.r_max, 1), _check_limit("d_max", renorm.d_max, 0))
    known = not any(isinstance(limit, Tracer) for limit in limits)
    return None if known and limits == (1, 0) else limits


def _check_limit(name: str, limit: float | jax.Array, least: int) -> float | jax.Array:
    if getattr(limit, "ndim", 0):
        raise ValueError(
            f"{name} must be a scalar, got shape {jnp.shape(limit)}; one limit serves all features."
        )
    if not is_number(limit):
        raise TypeError(
            f"{name} must be a real number, got {type(limit).__name__}; write for example "
            "jaxnorm.Renorm(r_max=3.0, d_max=5.0)."
        )
    if isinstance(limit, Tracer):
        return limit
    limit = float(limit)
    if not limit >= least:
        raise ValueError(
            f"{name} must be at least {least}, got {limit}; Renorm(1, 0) corrects nothing, and "
            "greater limits correct more."
        )
    return limit


def without_kernel(renorm: Renorm | None, implementation: str | None = None) -> str | None:
    """Return the implementation, which is XLA for batch renormalization.

    Raises:
      KernelUnavailableError: renorm is given with `implementation="kernel"`.
    """
    if renorm is None:
        return implementation
    if check_implementation(implementation) == "kernel":
        raise KernelUnavailableError(
            "no kernel does batch renormalization, unless the limits are the numbers 1 and 0"
        )
    return "xla"


def normalize_batch(
    spec: NormSpec, arrays: Arrays, mean: jax.Array, var: jax.Array, renorm: Renorm | None
) -> tuple[jax.Array, Moments]:
    """Standardize x by its own statistics; with renorm, correct towards the running statistics.

    The second result is the moments, over the devices.
    """
    if renorm is None:
        return norm_and_moments(spec, arrays)
    mean = check_feature_array(mean, "the running mean", spec.layout, spec.dtype)
    var = check_feature_array(var, "the running variance", spec.layout, spec.dtype)
    return _renormalize(spec, arrays, mean, var, renorm)


@program
def _renormalize(spec, arrays, mean, var, renorm):
    x, params, where, *_ = arrays
    with jax.named_scope(spec.name):
        stats = statistics(spec, x, where)
        r, d = _corrections(spec, *lax.stop_gradient((stats, mean, var)), renorm)
        params, whole = _corrected(spec, params, r, d), spec._replace(scale_offset=0.0)
        y, stats = standardize_measured(whole, x, stats, params, where)
    return y, stats.moments(spec.layout, spec.devices)


def _corrections(
    spec: NormSpec, stats: Statistics, mean: jax.Array, var: jax.Array, renorm: Renorm
) -> tuple[jax.Array, jax.Array]:
    """Return r and d, which broadcast to x; they are 1 and 0 where nothing counts."""
    mean, var = map(spec.layout.broadcast, (mean, var))
    high, low, own_var, count, _ = map(spec.layout.broadcast_statistics, jax.tree.leaves(stats))
    # A state in float64 keeps its precision if x is in float32.
    dtype = promote(own_var.dtype, var.dtype, real_dtype(mean.dtype))
    r_max, d_max = (lax.stop_gradient(as_array(limit).astype(dtype)) for limit in renorm)
    own_std, std = (jnp.sqrt(v.astype(dtype) + spec.epsilon) for v in (own_var, var))
    high, low, mean = (a.astype(promote(dtype, high.dtype, mean.dtype)) for a in (high, low, mean))
    shift = (high - mean) + low
    r = jnp.clip(_ratio(own_std, std), 1 / r_max, r_max)
    # Limit the absolute value of the shift; for a real shift this is clipping.
    size = jnp.minimum(_ratio(jnp.abs(shift), std), d_max)
    d = jnp.sign(shift) * size.astype(shift.dtype)
    return spec.prepare(jnp.where(count > 0, r, 1)), spec.prepare(jnp.where(count > 0, d, 0))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a / b: infinite where only b is zero, and zero where both are."""
    return jnp.where(a == 0, 0, a / b)


def _corrected(spec: NormSpec, params: NormParams, r: jax.Array, d: jax.Array) -> NormParams:
    """Merge r and d into the parameters: (x_hat r + d) scale + bias; without an offset."""
    if params.scale is not None:
        scale = effective_scale(spec, params.scale)
        r, d = scale * r, scale * d
    if params.bias is not None:
        d = spec.prepare(spec.layout.broadcast(params.bias)) + d
    return NormParams(r, d)
