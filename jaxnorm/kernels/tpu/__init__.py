"""The TPU's kernels, in Pallas: layer norm and rms norm of rows.

Each reads its arrays once and writes its results once. blocks.py divides x into blocks, rows.py
computes one, calls.py tells Pallas about both. Pallas is imported when a kernel is called, as it
takes longer than all of jaxnorm.
"""

import functools
from importlib.machinery import PathFinder
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.kernels.request import Request, common_refusal, one_scale, rows_of
from jaxnorm.kernels.tpu import blocks

interpret: Any = False  # what Pallas is told; tests run the kernels without a TPU

# Arrays like x, and rows of float32 numbers beside them, each copied while the other is computed.
# The sums for scale and bias are three tiles of eight rows each.
_FORWARD, _BACKWARD = {"arrays": 2, "features": 4}, {"arrays": 3, "features": 54}
_RESIDUAL = {"arrays": 2, "features": 0}


@functools.cache
def missing() -> str | None:
    """Why there is no kernel here, or None if there is one."""
    path = list(jax.__path__)
    for name in ("experimental", "pallas", "tpu"):
        found = PathFinder.find_spec(name, path)  # imports nothing
        if found is None:
            return "this jax has no Pallas for TPUs: install a newer one"
        path = list(found.submodule_search_locations or ())
    return None


def level() -> str:
    """What hardware it is compiled for, and by what."""
    return "TPUs, by Pallas"


def unproven() -> str:
    """Why it has to be asked for."""
    return "it was never run on a TPU: ask for it by implementation='kernel'"


@functools.cache
def declines(request: Request) -> str | None:
    """Why it does not support such a call, or None if it does."""
    if reason := common_refusal(request) or one_scale(request):
        return reason
    rows = rows_of(request.block)
    if rows is None:
        return "it takes layer and rms norm over the last axes, of known sizes, only"
    itemsize = jnp.dtype(request.dtype).itemsize
    limit = blocks.longest_row(itemsize, **_with_residual(_BACKWARD, request.adds))
    if rows[1] > limit:
        return (
            f"a few rows must fit on the chip, so it takes up to {limit} features, and x has "
            f"{rows[1]}"
        )
    return None


def value(
    x: jax.Array,
    residual: jax.Array | None,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    block: tuple[int, int, int, int],
    batch: int,
    epsilon: float,
    subtract_mean: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array | None, jax.Array, jax.Array]:
    """y, the sum and the statistics."""
    from jaxnorm.kernels.tpu import calls

    k = block[3]
    plan = _plan(x, batch, k, _with_residual(_FORWARD, residual is not None))
    given = {
        "x": _rows(x, plan),
        "residual": _rows(residual, plan),
        "scale": _features(scale),
        "bias": _features(bias),
    }
    found = calls.forward(
        plan, _there(given), epsilon=epsilon, subtract_mean=subtract_mean, interpret=interpret
    )
    y, total = (
        _as_given(found[name], plan, k).reshape(x.shape) if name in found else None
        for name in ("y", "total")
    )
    high, low, var, rstd = (
        _from_numbers(found[name], plan) if name in found else None
        for name in ("high", "low", "var", "rstd")
    )
    assert y is not None
    assert var is not None
    assert rstd is not None
    return y, total, high, low, var, rstd


def cotangent(
    x: jax.Array,
    dy: jax.Array,
    dtotal: jax.Array | None,
    scale: jax.Array | None,
    mean_high: jax.Array | None,
    mean_low: jax.Array | None,
    rstd: jax.Array,
    *,
    block: tuple[int, int, int, int],
    batch: int,
    wanted: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The gradients, of `batch` blocks."""
    from jaxnorm.kernels.tpu import calls

    plan = _plan(x, batch, block[3], _with_residual(_BACKWARD, dtotal is not None))
    names = tuple(n for n, is_wanted in zip(("dscale", "dbias"), wanted, strict=True) if is_wanted)
    given = {
        "x": _rows(x, plan),
        "dy": _rows(dy, plan),
        "dtotal": _rows(dtotal, plan),
        "scale": _features(scale),
        "high": _numbers(mean_high, plan),
        "low": _numbers(mean_low, plan),
        "rstd": _numbers(rstd, plan),
    }
    found = calls.backward(plan, _there(given), names, interpret=interpret)
    dscale, dbias = (
        found[name].sum((1, 2)) if name in found else None for name in ("dscale", "dbias")
    )
    return _as_given(found["dx"], plan, block[3]).reshape(x.shape), dscale, dbias


def _with_residual(needs: dict[str, int], adds: bool) -> dict[str, int]:
    """What the kernel holds, with the residual and what becomes of it."""
    return {name: size + adds * _RESIDUAL[name] for name, size in needs.items()}


def _plan(x: jax.Array, batch: int, k: int, needs: dict[str, int]) -> blocks.Plan:
    return blocks.plan(x.shape, x.dtype.itemsize, batch=batch, k=k, **needs)


def _there(arrays: dict[str, jax.Array | None]) -> dict[str, jax.Array]:
    return {name: a for name, a in arrays.items() if a is not None}


def _features(a: jax.Array | None) -> jax.Array | None:
    return None if a is None else a.astype(jnp.float32).reshape(1, -1)


def _in_order(a: jax.Array, plan: blocks.Plan, *last: int) -> jax.Array:
    """An array of all rows, each of the shape `last`, with its axes in the kernel's order."""
    axes = (*plan.order, *range(len(plan.order), len(plan.order) + len(last)))
    return a.reshape(*plan.leading, *last).transpose(axes)


def _as_given(a: jax.Array, plan: blocks.Plan, *last: int) -> jax.Array:
    """The inverse of `_in_order`."""
    ordered = [plan.leading[axis] for axis in plan.order]
    axes = [plan.order.index(axis) for axis in range(len(plan.order))]
    axes += range(len(axes), len(axes) + len(last))
    return a.reshape(*ordered, *last).transpose(axes)


def _rows(a: jax.Array | None, plan: blocks.Plan) -> jax.Array | None:
    """An array like x, as the kernel takes it."""
    return None if a is None else _in_order(a, plan, plan.shape[-1]).reshape(plan.shape)


def _numbers(a: jax.Array | None, plan: blocks.Plan) -> jax.Array | None:
    """An array of one number for each row, as the kernel takes it."""
    if a is None:
        return None
    a = _in_order(a, plan).reshape(plan.shape[:3])
    left = plan.statistics[2] * plan.rows - plan.shape[2]
    return jnp.pad(a, ((0, 0), (0, 0), (0, left))).reshape(plan.statistics)


def _from_numbers(a: jax.Array, plan: blocks.Plan) -> jax.Array:
    """The inverse of `_numbers`; the last block may be larger than what is there."""
    batch, examples, positions, _ = plan.shape
    return _as_given(a.reshape(batch, examples, -1)[:, :, :positions], plan).reshape(-1, 1)
