"""Arithmetic: dtypes, squares, rounding, division by zero."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

_CONFIG: Any = jax.config  # its attributes are made at run time


def as_array(a: ArrayLike) -> jax.Array:
    """Convert `a` to a JAX array, unless it is one: this is faster than jnp.asarray."""
    return a if isinstance(a, jax.Array) else jnp.asarray(a)


def promote(*dtypes: DTypeLike) -> jnp.dtype:
    """Return the smallest dtype that holds all of these, for any setting of JAX's promotion."""
    return _promote(_CONFIG.jax_enable_x64, *dtypes)


@functools.cache
def _promote(x64: bool, *dtypes: DTypeLike) -> jnp.dtype:
    del x64  # on which the result depends
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def is_small_float(dtype: DTypeLike) -> bool:
    """Return whether a floating-point dtype has at most eight bits; JAX does not promote these."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of the absolute value: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype


def real_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return Re(a conj(b)), which is a b for real numbers."""
    if jnp.iscomplexobj(a):
        return jnp.real(a) * jnp.real(b) + jnp.imag(a) * jnp.imag(b)
    return a * b


def square(a: jax.Array) -> jax.Array:
    """Return the squared absolute value, which is real."""
    return real_product(a, a)


def absolute(a: jax.Array) -> jax.Array:
    """Return the absolute value, whose derivative at zero is zero (with jnp.abs it is one)."""
    return jnp.abs(a) if jnp.iscomplexobj(a) else a * lax.stop_gradient(jnp.sign(a))


def drop_last_bit(a: jax.Array) -> jax.Array:
    """Round `a` to one bit less than its dtype has.

    LLVM may contract x - total * (1 / n) into one operation, which subtracts the product before it
    is rounded, in some loops of a program but not in all. With one bit less, every loop subtracts
    the same number.
    """
    if jnp.iscomplexobj(a):
        return lax.complex(drop_last_bit(jnp.real(a)), drop_last_bit(jnp.imag(a)))
    kind = jnp.finfo(a.dtype)
    return lax.reduce_precision(a, kind.nexp, kind.nmant - 1)


def zero_where(condition: jax.Array, a: jax.Array) -> jax.Array:
    """Set `a` to zero where the condition holds; leave its derivative as it is."""
    return a - lax.stop_gradient(jnp.where(condition, a, 0))


def reciprocal_or_zero(a: jax.Array) -> jax.Array:
    """Return 1 / a where a is positive, else zero, with derivatives of any order."""
    return jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 0)


def reciprocal_std(var: jax.Array, epsilon: float, count: jax.Array | None = None) -> jax.Array:
    """Return (var + epsilon)**-1/2; zero where the count is zero, or where it would be infinite.

    With zero, the result for such elements is the bias and their gradient is zero; with infinity,
    both would be NaN. If neither case is possible, this is one operation, which XLA can fuse.
    """
    if count is None and var.dtype.type(epsilon) > 0:
        return lax.rsqrt(var + epsilon)
    zero = var + epsilon <= 0
    if count is not None:
        zero |= count == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, var + epsilon)))


def magnitude(a: jax.Array) -> jax.Array:
    """Return a power of two near `a`, which is at least 0.

    A product with it is exact; neither it nor its reciprocal is zero or infinite.
    """
    kind = jnp.finfo(a.dtype)
    rounded = functools.partial(lax.reduce_precision, exponent_bits=kind.nexp, mantissa_bits=1)
    # With one bit a number is 2**k or 1.5 * 2**k, and three times that is 3 * 2**k or, rounded,
    # 4 * 2**k. Zero bits would be simpler, but exporters do not support them.
    a = jnp.clip(rounded(a), kind.tiny, 1 / kind.tiny)
    return rounded(3 * a) - 2 * a


@jax.custom_jvp
def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a / b for real, nonzero b; the derivative has no power of b that can overflow."""
    if jnp.iscomplexobj(a):
        return lax.complex(jnp.real(a) / b, jnp.imag(a) / b)
    return a / b


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    (a, b), (ta, tb) = primals, tangents
    result = quotient(a, b)
    rate = ta - result * tb.astype(a.dtype)
    return result, rate * quotient(jnp.ones_like(b), b).astype(a.dtype)


@jax.custom_jvp
def tanh(a: jax.Array) -> jax.Array:
    """Return the hyperbolic tangent of real numbers, with an accurate derivative.

    The usual 1 - tanh(a)**2 cancels: in float32 it has no correct digit from about a = 9 on.
    """
    return jnp.tanh(a)


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    ((a,), (ta,)) = primals, tangents
    return tanh(a), ta * _sech_squared(a)


@jax.custom_jvp
def _sech_squared(a):
    decay = jnp.exp(-2 * jnp.abs(a))  # which can't overflow
    return 4 * decay / (1 + decay) ** 2


@_sech_squared.defjvp
def _sech_squared_jvp(primals, tangents):
    ((a,), (ta,)) = primals, tangents
    result = _sech_squared(a)
    return result, ta * (-2 * tanh(a) * result)
