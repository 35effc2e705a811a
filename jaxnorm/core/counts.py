"""How many elements count, and averages over them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm.core.arithmetic import real_dtype, square
from jaxnorm.core.spec import NormSpec

Count = jax.Array | np.ndarray  # a NumPy array is the same on all devices


def count_all(spec: NormSpec) -> Count:
    """Return the count without a mask."""
    dtype, count = real_dtype(spec.compute_dtype), spec.layout.count
    if isinstance(count, int):
        return np.full([1] * len(spec.layout.shape), count, dtype)  # the same on all devices
    # A symbolic shape, of jax.export.
    return jnp.broadcast_to(jnp.asarray(count, dtype), spec.layout.statistics_shape)


def count_of(spec: NormSpec, where: jax.Array | None) -> Count:
    """Return how many elements count, for each statistic."""
    if where is None:
        return count_all(spec)
    # Summed as integers: float32 stops counting at 2**24.
    counted = spec.layout.sum(jnp.ones(spec.layout.shape, jnp.int32), where)
    return counted.astype(real_dtype(spec.compute_dtype))


def average(spec: NormSpec, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    """Average over the elements that count; zero where none does."""
    return spec.layout.sum(a, where) / at_least_one(count).astype(a.dtype)


def mean_square(spec: NormSpec, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    """Average the squares of a; they may be too large for a plain sum."""
    scaled, divisor = squares(spec, a, count)
    return spec.layout.sum(scaled, where) / divisor


def squares(spec: NormSpec, a: jax.Array, count: Count) -> tuple[jax.Array, jax.Array]:
    """Return squares, scaled so that their sum does not overflow, and the divisor of that sum."""
    scale = _square_scale(spec)
    return square(a * scale.astype(a.dtype)), at_least_one(count) * scale**2


def at_least_one(count: Count) -> jax.Array:
    """Return a divisor for averages: where nothing counts, the sum is zero."""
    return jnp.where(count > 0, count, 1)


def _square_scale(spec: NormSpec) -> jax.Array:
    """Return a power of two near 1 / sqrt(n), which scales squares without rounding."""
    n, dtype = spec.layout.count, real_dtype(spec.compute_dtype)
    if isinstance(n, int):
        return jnp.asarray(2.0 ** -math.ceil(math.log2(max(n, 1)) / 2), dtype)
    # A symbolic shape, of jax.export.
    return lax.rsqrt(jnp.maximum(jnp.asarray(n, dtype), 1))
