"""Lengths and directions of vectors, by squares that neither overflow nor underflow."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core.arithmetic import magnitude, promote, real_product, reciprocal_std, square
from jaxnorm.core.axes import Axes
from jaxnorm.core.layout import Layout
from jaxnorm.core.layouts import moments_layout


def two_norm(x: jax.Array, axes: Axes, where: jax.Array | None = None) -> jax.Array:
    """Return the 2-norm of x over the axes, which are kept; real, in float32 or better.

    Elements count where `where` is True, which broadcasts against x. The derivative at zero is
    zero.
    """
    return _two_norm(x, where, moments_layout(x.shape, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _two_norm(x, where, layout):
    scaled, scale = scaled_to_one(x, layout, where)
    power = layout.sum(square(scaled))
    zero = power == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, power))) * scale


@_two_norm.defjvp
def _two_norm_jvp(layout, primals, tangents):
    x, where = primals
    norm = _two_norm(x, where, layout)

    # The backward pass keeps x in its own dtype and recomputes the rest.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(residuals, tx):
        x, norm = lax.optimization_barrier(residuals)
        scaled, scale = scaled_to_one(x, layout, where)
        length = jnp.where(norm > 0, norm / scale, 1)
        # Of zeros, `scaled` is a constant, so that all higher derivatives are zero too.
        direction = jnp.where(norm > 0, scaled, 0) / length.astype(scaled.dtype)
        return layout.sum(real_product(direction, tx.astype(scaled.dtype)))

    return norm, tangent((x, norm), tangents[0])


def unit(x: jax.Array, axes: Axes, epsilon: float = 0.0) -> jax.Array:
    """Return x / sqrt(|x|**2 + epsilon), with the 2-norm over the axes; in float32 or better.

    Zero stays zero. If epsilon is zero, so is the derivative there.
    """
    return _unit(x, moments_layout(x.shape, axes), epsilon)


# The backward pass keeps x in its own dtype and recomputes this.
@functools.partial(jax.checkpoint, static_argnums=(1, 2))
def _unit(x, layout, epsilon):
    root = math.sqrt(epsilon)
    scaled, scale = scaled_to_one(x, layout, least=root)
    power = layout.sum(square(scaled)) + square(root / scale)
    return scaled * reciprocal_std(power, 0.0).astype(scaled.dtype)


def scaled_to_one(
    x: jax.Array, layout: Layout, where: jax.Array | None = None, least: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Divide x by a constant near its largest element, or near `least`; return both.

    The constant is a power of two, so that the division is exact, and its reciprocal is finite. x
    is cast to float32 or better, and is zero where it does not count.
    """
    x = x.astype(promote(x.dtype, jnp.float32))
    if where is not None:
        x = jnp.where(where, x, 0)
    size = jnp.abs(lax.stop_gradient(x))
    largest = jnp.max(size, layout.reduction_axes, keepdims=True, initial=least)
    scale = magnitude(largest)
    return x * (1 / scale).astype(x.dtype), scale
