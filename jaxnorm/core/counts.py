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
    """The count where nothing is masked."""
    dtype, count = real_dtype(spec.compute_dtype), spec.layout.count
    if isinstance(count, int):
        return np.full([1] * len(spec.layout.shape), count, dtype)  # the same on all devices
    # A symbolic shape, of jax.export.
    return jnp.broadcast_to(jnp.asarray(count, dtype), spec.layout.statistics_shape)


def count_of(spec: NormSpec, where: jax.Array | None) -> Count:
    """How many elements count, for each statistic."""
    if where is None:
        return count_all(spec)
    # Summed as integers: float32 stops counting at 2**24.
    counted = spec.layout.sum(jnp.ones(spec.layout.shape, jnp.int32), where)
    return counted.astype(real_dtype(spec.compute_dtype))


def average(spec: NormSpec, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    """The average of a over the elements that count; zero where none does."""
    return spec.layout.sum(a, where) / at_least_one(count).astype(a.dtype)


def mean_square(spec: NormSpec, a: jax.Array, where: jax.Array | None, count: Count) -> jax.Array:
    """The average of the squares of a, which may be large."""
    scaled, divisor = squares(spec, a, count)
    return spec.layout.sum(scaled, where) / divisor


def squares(spec: NormSpec, a: jax.Array, count: Count) -> tuple[jax.Array, jax.Array]:
    """The squares of a, scaled so that their sum does not overflow, and what divides that sum."""
    scale = _square_scale(spec)
    return square(a * scale.astype(a.dtype)), at_least_one(count) * scale**2


def at_least_one(count: Count) -> jax.Array:
    """What to divide by: where nothing counts the sum is zero, too."""
    return jnp.where(count > 0, count, 1)


def _square_scale(spec: NormSpec) -> jax.Array:
    """About 1 / sqrt(n), so that sums of scaled squares don't overflow; exact, a power of two."""
    n, dtype = spec.layout.count, real_dtype(spec.compute_dtype)
    if isinstance(n, int):
        return jnp.asarray(2.0 ** -math.ceil(math.log2(max(n, 1)) / 2), dtype)
    # A symbolic shape, of jax.export.
    return lax.rsqrt(jnp.maximum(jnp.asarray(n, dtype), 1))
