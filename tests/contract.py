"""What every implementation of a norm must get right: its inputs, and the truth in float64.

The truth of the derivatives is NumPy's too. The derivative of standardizing is symmetric, so one
function (`oracle.gradient`) is both its cotangent and its tangent.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

EPS = float(np.finfo(np.float32).eps)

# Sizes that fill no vector, and that fill each; groups of one; more than one task; long rows.
SHAPES = {
    "1-feature": (2, 3, 1),
    "1-position": (5, 1, 7),
    "1000-features": (3, 7, 1000),
    "1000-positions": (2, 1000, 7),
    "1152-features": (96, 9, 1152),
    "long-rows": (1, 2, 2**18 + 1),
    "long-columns": (1, 2**18 + 1, 2),
}


class Example(NamedTuple):
    """Arguments of a norm, a tangent of each, and a cotangent of y."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    tx: np.ndarray
    tscale: np.ndarray
    tbias: np.ndarray
    dy: np.ndarray


class Results(NamedTuple):
    """What they give, each of them an array."""

    y: jax.Array
    dx: jax.Array
    dscale: jax.Array
    dbias: jax.Array
    ty: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compute(norm, implementation, epsilon, example):
    """All results in one program."""
    f = functools.partial(norm, implementation=implementation, epsilon=epsilon)
    primals, tangents = tuple(example[:3]), tuple(example[3:6])
    y, pullback = jax.vjp(f, *primals)
    return Results._make((y, *pullback(example.dy), jax.jvp(f, primals, tangents)[1]))


def program(f, *args) -> str:
    """The text of the compiled program."""
    return jax.jit(f).lower(*args).compile().as_text() or ""


def example_of(norm, shape, dtype=jnp.float32, param_dtype=jnp.float32, *, mean=1.0, std=1.0):
    """Random arguments, exactly as the dtypes hold them."""
    rng = np.random.default_rng(math.prod(shape))
    features = norm.features(shape)
    draw = lambda shape: rng.standard_normal(shape, np.float32)
    x = (mean + std * draw(shape)).astype(dtype)
    scale, bias = (1 + draw(features)).astype(param_dtype), draw(features).astype(param_dtype)
    tx, dy = ((factor * draw(shape)).astype(dtype) for factor in (std, 1))
    tscale, tbias = (draw(features).astype(param_dtype) for _ in range(2))
    return Example(x, scale, bias, tx, tscale, tbias, dy)


def truth(norm, example, epsilon):
    """The results; and of each the size of what it is the difference or the sum of.

    That is what rounding is relative to: where a group has one element, its gradient is zero, the
    difference of two equal numbers. A sum's is what it would be if signs were random.
    """
    a = Example._make(map(oracle.wide, example))
    axes = norm.reduction_axes(a.x.ndim)
    along = tuple(range(a.x.ndim - a.scale.ndim))  # that the parameters don't span
    split, how = norm.split, {"subtract_mean": norm.subtract_mean}
    h, rstd, _ = oracle.standardized(split(a.x), axes, epsilon, **how)
    h = h.reshape(a.x.shape)

    def of_x(g):
        return oracle.gradient(split(a.x), split(g), axes, epsilon, **how).reshape(a.x.shape)

    def steep(g):
        return (split(g) * rstd).reshape(a.x.shape)

    terms = a.dy * h
    # x less the mean is the difference of two such numbers: of x less the mean's high part, and of
    # its low part.
    difference = np.abs(h) + EPS * steep(np.abs(a.x))
    results = Results(
        h * a.scale + a.bias,
        of_x(a.dy * a.scale),
        terms.sum(along),
        a.dy.sum(along),
        of_x(a.tx) * a.scale + h * a.tscale + a.tbias,
    )
    scales = Results(
        difference * a.scale,
        steep(a.dy * a.scale),
        np.sqrt(((a.dy * difference) ** 2).sum(along)),
        np.sqrt((a.dy**2).sum(along)),
        steep(a.tx) * a.scale,
    )
    sizes = [max(np.abs(r).max(), np.abs(s).max()) for r, s in zip(results, scales, strict=True)]
    return results, Results._make(sizes)


def assert_kept(norm, example, results, epsilon, *, formula):
    """Raise unless the results are right, to what float32 and their dtypes can hold."""
    terms = example.x.size // example.scale.size
    assert_near(results, *truth(norm, example, epsilon), terms, formula=formula)


def assert_near(results, expected, sizes, terms, *, formula):
    """Check against a given truth; gradients of scale and bias are sums of `terms` terms."""
    for name, result, right, size in zip(Results._fields, results, expected, sizes, strict=True):
        units = 4.0  # rounding of the mean, of rstd, and of the operations of the formula
        casts = 1
        if formula and name in ("dscale", "dbias"):
            # Kernels add in float64 after few terms, XLA adds all in float32: each addition is
            # rounded by a unit of the sum, and n roundings of random sign add up to sqrt(n).
            units *= math.sqrt(terms)
        if formula and name == "dx":
            casts = 3  # JAX adds up the gradients of each use of x in the dtype of x
        rounding = 0.51 * casts * float(jnp.finfo(result.dtype).eps)
        error = np.abs(oracle.wide(np.asarray(result).astype(np.float32)) - right).max()
        assert error <= (rounding + units * EPS) * size, (name, error, size)
