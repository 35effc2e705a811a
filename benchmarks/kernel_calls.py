"""The calls of a kernel of rows that adds a residual, as a norm would make them."""

import math
from collections.abc import Callable

from benchmarks.cases import EPSILON, Problem
from jaxnorm.kernels import Kernel


def with_residual(kernel: Kernel, problem: Problem) -> tuple[Callable, Callable]:
    """The two calls of a kernel of rows, as they are made where a residual is added."""
    k = problem.features
    block = math.prod(problem.shape) // k, 1, 1, k

    def forward(x, residual, params):
        """y; and what is kept: the sum, the mean and rstd, with an axis of one for the features."""
        y, total, *mean, _, rstd = kernel.value(
            x,
            residual,
            params["scale"],
            params.get("bias"),
            block=block,
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
