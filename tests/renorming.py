"""What the tests of batch renormalization share: a problem that meets every clip, and its truth."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from transformations import SHAPE

import jaxnorm as jn

LIMITS = (1.5, 0.5)
# For x of mean and variance one: both corrections are clipped from above, from below, and not.
MEAN, VAR = np.array([0.0, 0.9, 1.2, 6.0]), np.array([0.1, 0.9, 9.0, 1.1])


def state_of(dtype=jnp.float32, shift=0.0):
    return jn.BatchNormState(
        jnp.asarray(MEAN + shift, dtype), jnp.asarray(VAR, dtype), jnp.int32(3)
    )


def renormed(x, scale=None, bias=None, where=None, state=None, limits=LIMITS, **options):
    """y alone."""
    params, state = jn.NormParams(scale, bias), state_of() if state is None else state
    renorm = jn.Renorm(*limits)
    return jn.batch_norm(x, state, params=params, where=where, renorm=renorm, **options)[0]


def problem(rng, dtype: Any = np.float32, shape=SHAPE) -> tuple[Any, ...]:
    """x, scale and bias, and the cotangent of y."""
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)
    return draw(shape) + dtype(1), 1 + draw(shape[-1:]), draw(shape[-1:]), draw(shape)


def some(rng, shape=SHAPE):
    """A mask, under which the third feature counts nowhere."""
    return (rng.random(shape) < 0.7) & (np.arange(shape[-1]) != 2)


def truth(x, scale, bias, dy, where=None, state=None, limits=LIMITS, epsilon=1e-5):
    """y and the gradients of x, scale and bias; the features come last."""
    running = (MEAN, VAR) if state is None else state[:2]
    axes = tuple(range(x.ndim - 1))
    r, d = oracle.corrections(x, axes, running, limits, epsilon, where)
    h, dy = oracle.standardized(x, axes, epsilon, where)[0], oracle.wide(dy)
    y = oracle.batch_renorm(x, running, limits, scale, bias, epsilon=epsilon, where=where)
    dx = oracle.gradient(x, dy * oracle.wide(scale) * r, axes, epsilon, where)
    return y, dx, (dy * (h * r + d)).sum(axes), dy.sum(axes)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
