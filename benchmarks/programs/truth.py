"""The inputs of all peers, and the exact results: NumPy in float64."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from benchmarks.programs.cases import EPSILON, WIDTH, Case, Problem

Arrays = dict[str, np.ndarray]


@functools.lru_cache(maxsize=1)
def inputs(problem: Problem) -> Arrays:
    """x and dy in the problem's dtype; scale and (except for rms norm) bias in float32.

    Scale and bias can be represented in bfloat16, for peers that require it.
    """
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(problem.dtype)
    x, dy = (rng.standard_normal(problem.shape, np.float32).astype(dtype) for _ in range(2))
    scale, bias = (
        a.astype(jnp.bfloat16).astype(np.float32)
        for a in rng.normal([[1], [0]], 0.3, (2, problem.features))
    )
    arrays = {"x": 1 + x, "scale": scale, "bias": bias, "dy": dy}
    if problem.norm == "rms":
        del arrays["bias"]
    return arrays


@functools.lru_cache(maxsize=1)
def context_inputs(problem: Problem) -> Arrays:
    """Return the additional inputs of "context": z = norm(a @ w_in + b_in + x) @ w_out, and dz."""
    rng = np.random.default_rng(1)
    shapes = {
        "a": (*problem.shape[:-1], WIDTH),
        "w_in": (WIDTH, problem.features),
        "b_in": (problem.features,),
        "w_out": (problem.features, WIDTH),
        "dz": (*problem.shape[:-1], WIDTH),
    }
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays["w_in"] /= math.sqrt(WIDTH)
    arrays["w_out"] /= math.sqrt(problem.features)
    return {name: a.astype(jnp.dtype(problem.dtype)) for name, a in arrays.items()}


@functools.lru_cache(maxsize=3)
def truth(case: Case) -> Arrays:
    """Return the exact results, by name.

    The gradient of b_in is not included: before batch and instance norm it is zero, and a relative
    error of zero is not meaningful.
    """
    if case.mode == "both":
        return truth(case._replace(mode="forward")) | truth(case._replace(mode="backward"))
    problem = case.problem
    given = {name: a.astype(np.float64) for name, a in inputs(problem).items()}
    x, scale, bias = given["x"], given["scale"], given.get("bias", np.float64(0))
    if case.mode == "forward":
        return {"y": standardize(problem, x)[0] * scale + bias}
    if case.mode == "backward":
        return gradients(problem, x, scale, given["dy"])
    given |= {name: a.astype(np.float64) for name, a in context_inputs(problem).items()}
    a, w_in, w_out, dz = (given[name] for name in ("a", "w_in", "w_out", "dz"))
    h = a @ w_in + given["b_in"] + x
    y = standardize(problem, h)[0] * scale + bias
    norm = gradients(problem, h, scale, dz @ w_out.T)
    dh = norm["dx"]
    rows = [np.reshape(m, (-1, m.shape[-1])) for m in (a, dh, y, dz)]
    return norm | {
        "z": y @ w_out,
        "da": dh @ w_in.T,
        "dw_in": rows[0].T @ rows[1],
        "dw_out": rows[2].T @ rows[3],
    }


def standardize(problem: Problem, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x - mean) / sqrt(var + epsilon), and 1 / sqrt(...), which broadcasts against the view."""
    view, shared = grouped(problem, x)
    mean = 0 if problem.norm == "rms" else view.mean(shared, keepdims=True)
    centred = view - mean
    rstd = 1 / np.sqrt((centred**2).mean(shared, keepdims=True) + EPSILON)
    return (centred * rstd).reshape(x.shape), rstd


def gradients(problem: Problem, x: np.ndarray, scale: np.ndarray, dy: np.ndarray) -> Arrays:
    """Return the derivatives of sum(y * dy)."""
    features_last = tuple(range(x.ndim - 1))
    h, rstd = standardize(problem, x)
    results = {"dscale": (dy * h).sum(features_last), "dbias": dy.sum(features_last)}
    h, shared = grouped(problem, h)
    g, _ = grouped(problem, dy * scale)
    own = h * (g * h).mean(shared, keepdims=True)
    if problem.norm == "rms":
        del results["dbias"]
    else:
        own += g.mean(shared, keepdims=True)
    return results | {"dx": (rstd * (g - own)).reshape(x.shape)}


def grouped(problem: Problem, x: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return a view of x, and its axes that share statistics."""
    if problem.norm in ("layer", "rms"):
        return x, (-1,)
    if problem.norm == "batch":
        return x, tuple(range(x.ndim - 1))
    groups = problem.groups if problem.norm == "group" else problem.features
    return x.reshape(len(x), -1, groups, problem.features // groups), (1, 3)


def largest_error(case: Case, results: Arrays) -> float:
    """Return the largest error of all results, in units in the last place.

    The unit is that of the largest element of a result.
    """
    right, eps = truth(case), float(jnp.finfo(case.problem.dtype).eps)
    errors = [
        np.abs(results[name].astype(np.float64) - right[name]).max()
        / max(np.abs(right[name]).max(), float(jnp.finfo(case.problem.dtype).tiny))
        / eps
        for name in right
    ]
    return math.inf if np.isnan(errors).any() else float(max(errors))
