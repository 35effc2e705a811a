"""The norms of a residual sum, for tests: y and the sum, and the truth of both."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from contract import Results, example_of, truth
from norms import NORMS, Norm

import jaxnorm as jn


@dataclasses.dataclass(frozen=True, eq=False)
class AddNorm:
    """One of them; hashed by identity, so static in a jit."""

    norm: Norm  # of a sum that is taken before
    function: Callable

    def __call__(self, x, residual, scale=None, bias=None, where=None, **options):
        params = jn.NormParams(scale, bias)
        return self.function(x, residual, params, where=where, **(self.norm.options | options))

    def truth(self, x, residual, *params, **options):
        """y, in float64."""
        residual_sum = oracle.wide(x) + oracle.wide(residual)
        return self.norm.truth(residual_sum, *params, **(self.norm.options | options))

    # For the transformations of a norm: a function of x, scale and bias in which all that goes in
    # and comes out depends on x.

    def of_x(self, x, scale, bias, **options):
        """Ours."""
        y, residual_sum = self(x, jnp.cos(x), scale, bias, **options)
        return y + jnp.sin(residual_sum)

    def plain_of_x(self, x, scale, bias, **options):
        """The textbook's formula."""
        residual_sum = x + jnp.cos(x)
        return self.norm.plain(residual_sum, scale, bias, **options) + jnp.sin(residual_sum)


ADD_NORMS = [
    AddNorm(NORMS[1], jn.add_layer_norm),
    AddNorm(NORMS[2], jn.add_layer_norm),
    AddNorm(NORMS[3], jn.add_rms_norm),
]
ADD_NORM_IDS = ["layer", "layer-two-axes", "rms"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compute(add, implementation, epsilon, example, residual, d_residual_sum):
    """Return y, the residual sum, the gradients of x and of the residual, and `Results`.

    The tangent of the residual is -tx / 2, so that no dtype rounds the sum of the two.
    """
    f = functools.partial(add, implementation=implementation, epsilon=epsilon)
    primals = (example.x, residual, example.scale, example.bias)
    (y, residual_sum), pullback = jax.vjp(f, *primals)
    dx, dresidual, dscale, dbias = pullback((example.dy, d_residual_sum))
    tangents = (example.tx, -example.tx / 2, example.tscale, example.tbias)
    ty, ttotal = jax.jvp(f, primals, tangents)[1]
    return residual_sum, dresidual, ttotal, Results(y, dx, dscale, dbias, ty)


def expected(add, example, residual, d_residual_sum, epsilon):
    """The truth of `Results`, and the sizes of what they are sums of.

    y and the statistics are of the sum in float32. The derivatives standardize the sum in the dtype
    of x, by these statistics.
    """
    exact = example.x.astype(np.float32) + residual.astype(np.float32)
    results, sizes = truth(add.norm, example._replace(x=exact), epsilon)
    a = type(example)._make(map(oracle.wide, example))
    axes, how = add.norm.reduction_axes(exact.ndim), {"subtract_mean": add.norm.subtract_mean}
    mean, _, _ = oracle.statistics(oracle.wide(exact), axes, **how)
    _, rstd, _ = oracle.standardized(exact, axes, epsilon, **how)
    h = (oracle.wide(exact.astype(example.x.dtype)) - mean) * rstd
    average = functools.partial(np.mean, axis=axes, keepdims=True)

    def of_x(g):
        centred = g - average(g) if add.norm.subtract_mean else g
        return rstd * (centred - h * average(g * h))

    results = results._replace(
        dx=of_x(a.dy * a.scale) + oracle.wide(d_residual_sum),
        dscale=(a.dy * h).sum(tuple(range(h.ndim - a.scale.ndim))),
        ty=of_x(a.tx / 2) * a.scale + h * a.tscale + a.tbias,
    )
    pairs = zip(results, sizes, strict=True)
    return results, Results._make(max(np.abs(right).max(), size) for right, size in pairs)


def draw(add, shape=(4, 6, 8), dtype=jnp.float32):
    """An example, a residual and a cotangent of the residual sum."""
    rng = np.random.default_rng(1)
    residual, d_residual_sum = (
        rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(2)
    )
    return example_of(add.norm, shape, dtype), residual, d_residual_sum
