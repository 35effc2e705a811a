"""The length of vectors: the 2-norm, whose squares neither overflow nor underflow."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm.core.arithmetic import magnitude, promote, real_product, square
from jaxnorm.core.axes import Axes
from jaxnorm.core.layout import moments_layout


def two_norm(x: jax.Array, axes: Axes, where: jax.Array | None = None) -> jax.Array:
    """The 2-norm of x over the axes, which are kept with size one; real, in float32 or better.

    Elements count where `where` is True, which broadcasts against x. The derivative at zero is
    zero.
    """
    return _two_norm(x, where, moments_layout(x.shape, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _two_norm(x, where, layout):
    scaled, scale = _scaled(x, where, layout)
    return jnp.sqrt(layout.sum(square(scaled))) * scale


@_two_norm.defjvp
def _two_norm_jvp(layout, primals, tangents):
    x, where = primals
    norm = _two_norm(x, where, layout)

    # What follows from x is computed again in the backward pass, which keeps x in its own dtype.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(kept, tx):
        x, norm = lax.optimization_barrier(kept)
        scaled, scale = _scaled(x, where, layout)
        length = jnp.where(norm > 0, norm / scale, 1)
        # Of zeros, `scaled` is a constant, so that all higher derivatives are zero too.
        direction = jnp.where(norm > 0, scaled, 0) / length.astype(scaled.dtype)
        return layout.sum(real_product(direction, tx.astype(scaled.dtype)))

    return norm, tangent((x, norm), tangents[0])


def _scaled(x, where, layout):
    """x divided by a power of two near its largest element, in float32 or better; and that."""
    x = x.astype(promote(x.dtype, jnp.float32))
    if where is not None:
        x = jnp.where(where, x, 0)
    size = jnp.abs(lax.stop_gradient(x))
    largest = jnp.max(size, layout.reduction_axes, keepdims=True, initial=0)
    scale = magnitude(largest)
    return x * (1 / scale).astype(x.dtype), scale
