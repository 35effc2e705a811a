"""Programs of a norm, to compile for chips and to time on them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.programs.cases import Problem
from benchmarks.programs.jax_calls import JaxNorm


def size_of(tree: Any) -> int:
    """Add the bytes of all arrays of a tree."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def arguments(problem: Problem) -> tuple[Any, Any, Any]:
    """Return x, the parameters, and a weight to multiply y by."""
    like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    names = ("scale",) if problem.norm == "rms" else ("scale", "bias")
    params = {name: like(problem.features) for name in names}
    dtype = jnp.dtype(problem.dtype)
    weight = like(problem.features, problem.features, dtype=dtype)
    return like(*problem.shape, dtype=dtype), params, weight


class Programs(NamedTuple):
    """The programs of one norm.

    Attributes:
      forward: of x and the parameters: y, the new state, and the residuals except the arguments.
      pullback: of the same: the backward pass as a function that holds the residuals.
      backward: of the pullback and a cotangent: the gradients.
      context: of x, the parameters and a weight: the norm, its product with the weight, and the
        whole backward pass.
    """

    forward: Callable
    pullback: Callable
    backward: Callable
    context: Callable


def programs_of(norm: JaxNorm) -> Programs:
    """Return the programs of a library's norm, to compile."""
    call = lambda x, params: norm.apply(x, params, norm.state)

    def forward(x, params):
        y, pullback, state = jax.vjp(call, x, params, has_aux=True)
        given = jax.tree.leaves((x, params))
        kept = [a for a in jax.tree.leaves(pullback) if not any(a is b for b in given)]
        return y, state, kept

    def pullback(x, params):
        return jax.vjp(call, x, params, has_aux=True)[1]

    def context(x, params, weight):
        """Return the gradients of half the squared norm of the product: its cotangent is itself."""
        product = lambda *args: call(*args[:2])[0] @ args[2]
        y, backward = jax.vjp(product, x, params, weight)
        return backward(y)

    return Programs(forward, pullback, lambda pullback, dy: pullback(dy), context)
