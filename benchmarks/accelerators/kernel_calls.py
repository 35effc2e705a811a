"""The calls of a kernel of rows that adds a residual, as a norm would make them."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from benchmarks.programs.cases import EPSILON, Problem
from jaxnorm.kernels import Kernel
from jaxnorm.kernels.request import Request


def refusal(kernel: Kernel, problem: Problem) -> str | None:
    """Why the kernel does not support the problem with a residual, or None."""
    dtype, centred = jnp.dtype(problem.dtype), problem.norm == "layer"
    request = Request(_block(problem), dtype, dtype, centred, adds=True)
    return kernel.missing() or kernel.declines(request)


def _block(problem: Problem) -> tuple[int, int, int, int]:
    return math.prod(problem.shape) // problem.features, 1, 1, problem.features


def with_residual(kernel: Kernel, problem: Problem) -> tuple[Callable, Callable]:
    """The two calls of a kernel of rows, as they are made where a residual is added."""
    block = _block(problem)

    def forward(x, residual, params):
        """y; and what is kept: the sum, the mean and rstd, with an axis of one for the features."""
        y, total, *mean, _, rstd = kernel.value(
            x,
            residual,
            params["scale"],
            params.get("bias"),
            block=block,
            batch=1,
            epsilon=EPSILON,
            subtract_mean=problem.norm == "layer",
        )
        numbers = [a.reshape(*problem.shape[:-1], 1) for a in (*mean, rstd) if a is not None]
        return y, total, *numbers

    def backward(kept, params, dy, dtotal):
        total, *numbers = kept
        *mean, rstd = (a.reshape(1, -1, 1) for a in numbers)
        high, low = mean or (None, None)
        return kernel.cotangent(
            total,
            dy,
            dtotal,
            params["scale"],
            high,
            low,
            rstd,
            block=block,
            batch=1,
            wanted=(True, "bias" in params),
        )

    return forward, backward
