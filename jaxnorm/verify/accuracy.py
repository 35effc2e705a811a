"""The errors of a norm and its gradients, against NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.verify.cases import Case


def truth(case: Case, args: Any, cotangent: Any) -> dict[str, tuple[np.ndarray, Any]]:
    """Return the results in float64, each with the magnitude of the terms that it is the sum of."""
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    *summands, scale, bias = map(wide, args)
    dy = wide(cotangent[0] if case.has_residual else cotangent)
    x = np.float32(sum(summands)).astype(np.float64)
    # The backward pass uses the residual sum in the dtype of the result.
    residual_sum = wide(jnp.asarray(x, jnp.float32).astype(case.dtype))
    mean = lambda a: a.mean(-1, keepdims=True)
    mu = mean(x) if case.centred else 0
    var = mean((x - mu) ** 2) + case.epsilon
    rstd = np.where(var > 0, 1 / np.sqrt(np.where(var > 0, var, 1)), 0)
    y, x_hat, g = (x - mu) * rstd * scale + bias, (residual_sum - mu) * rstd, dy * scale
    dx = rstd * (g - x_hat * mean(g * x_hat) - (mean(g) if case.centred else 0))
    dx += dy if case.has_residual else 0
    column_norm = lambda a: np.sqrt((a**2).sum(0)).max()
    return {
        "y": (y, np.abs(y - bias).max()),
        "sum": (residual_sum, 0),
        "dx": (dx, np.abs(rstd * g).max()),
        "dscale": ((dy * x_hat).sum(0), column_norm(dy * x_hat)),
        "dbias": (dy.sum(0), column_norm(dy)),
    }


def errors(case: Case, implementation: str) -> dict[str, float]:
    """Return the error of each result in units of float32, beyond the rounding to its dtype."""
    args, cotangent = case.arrays()

    @jax.jit
    def results(args, cotangent):
        result, pullback = jax.vjp(case.function(implementation), *args)
        y, *residual_sum = jax.tree.leaves(result)
        dx, *dresidual, dscale, dbias = pullback(cotangent)
        named = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
        if residual_sum:  # x and the residual have bitwise the same gradient
            named["sum"] = residual_sum[0]
            named["dx"] = jnp.where(dx == dresidual[0], dx, jnp.nan)
        return named

    units, exact = {}, truth(case, args, cotangent)
    for name, a in results(args, cotangent).items():
        expected, size = exact[name]
        size = max(size, np.abs(expected).max(), np.finfo(np.float32).tiny)
        # The rounding to the dtype of the result does not count.
        rounding = 0.0 if a.dtype == jnp.float32 else 0.51 * float(jnp.finfo(a.dtype).eps)
        error = np.abs(np.asarray(a.astype(jnp.float32), np.float64) - expected).max() / size
        units[name] = np.maximum(0.0, error - rounding) / float(np.finfo(np.float32).eps)
    return units
