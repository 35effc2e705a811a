"""Call a kernel of rows with a residual, as a norm does."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from benchmarks.programs.cases import EPSILON, Problem
from jaxnorm.kernels import Kernel
from jaxnorm.kernels.request import Request


def unsupported_reason(kernel: Kernel, problem: Problem) -> str | None:
    """Return why the kernel does not support the problem with a residual, or None."""
    dtype, centred = jnp.dtype(problem.dtype), problem.norm == "layer"
    request = Request(_block(problem), dtype, dtype, centred, has_residual=True)
    return kernel.unavailable_reason() or kernel.unsupported_reason(request)


def _block(problem: Problem) -> tuple[int, int, int, int]:
    return math.prod(problem.shape) // problem.features, 1, 1, problem.features


def with_residual(kernel: Kernel, problem: Problem) -> tuple[Callable, Callable]:
    """Return the forward and backward calls of a kernel of rows with a residual."""
    block = _block(problem)

    def forward(x, residual, params):
        """Return y and the residuals: sum, mean and rstd, with one feature."""
        y, residual_sum, *mean, _, rstd = kernel.forward(
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
        return y, residual_sum, *numbers

    def backward(kept, params, dy, d_residual_sum):
        residual_sum, *numbers = kept
        *mean, rstd = (a.reshape(1, -1, 1) for a in numbers)
        high, low = mean or (None, None)
        return kernel.vjp(
            residual_sum,
            dy,
            d_residual_sum,
            params["scale"],
            high,
            low,
            rstd,
            block=block,
            batch=1,
            wanted=(True, "bias" in params),
        )

    return forward, backward
