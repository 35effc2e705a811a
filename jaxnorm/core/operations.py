"""The three operations of a norm: by their formula, and by a kernel.

    value(x, residual, params)                      -> y, statistics, total
    tangent(x, params, statistics, tx, tparams)     -> ty, tstatistics, ttotal    linear in tx, ...
    cotangent(x, params, statistics, dy, dtotal)    -> dx, dparams                its transpose

Without a residual there is no total. With one, the value adds it to x, and the x of the others is
the total: they are those of the norm of the total, and its tangent is tx.

A formula is the truth. The tangent is that of standardize.py and the cotangent is its transpose, so
the derivatives are written once. A kernel computes the value or the cotangent of the block
(n, s, g, k) that the norm is in memory; only here are the core's objects turned into the plain
arrays and numbers that kernels take.

All functions take a `NormSpec` first, and return lists of arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.core.counts import count_all
from jaxnorm.core.moments import Kept, Statistics, standardized
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams, affine, measure_and_standardize, norm_tangents
from jaxnorm.kernels import Kernel
from jaxnorm.kernels.request import Request


def arrays_of(stats: Statistics) -> list[jax.Array]:
    """The arrays of the statistics; the count is left out, as the shape tells it."""
    return jax.tree.leaves(stats._replace(count=None))


def statistics_of(spec: NormSpec, arrays: Sequence[jax.Array]) -> Statistics:
    """The inverse of `arrays_of`."""
    *mean, var, rstd = arrays
    high, low = mean or (None, None)
    return Statistics(high, low, var, jnp.broadcast_to(count_all(spec), var.shape), rstd)


def value(
    spec: NormSpec, x: jax.Array, residual: jax.Array | None, params: NormParams
) -> list[jax.Array]:
    """y, the statistics, and the total."""
    y, stats, total = measure_and_standardize(spec, x, residual, params)
    return [y, *arrays_of(stats), *jax.tree.leaves(total)]


def tangent(spec, x, params, stats, tx, tparams) -> list[jax.Array]:
    """The tangents of y, of the statistics and of the total; `tparams` None is zero."""
    tparams = jax.tree.map(jnp.zeros_like, params) if tparams is None else tparams
    kept = Kept(x, None, None, statistics_of(spec, stats), params)
    ty, tstats, ttotal = norm_tangents(spec, kept, tx, tparams)
    return [ty, *arrays_of(tstats), *jax.tree.leaves(ttotal)]


def cotangent(spec, x, params, stats, dy, dtotal) -> list[jax.Array]:
    """The cotangents of x and, if they are wanted, of the parameters; `dtotal` None is zero."""

    def linear(tx, tparams):
        results = tangent(spec, x, params, stats, tx, tparams)
        return results[0], None if dtotal is None else results[-1]

    dx, dparams = jax.linear_transpose(linear, x, params)((dy, dtotal))
    return [dx, *(jax.tree.leaves(dparams) if spec.param_gradients else ())]


def request(spec: NormSpec, dtype: jnp.dtype, params: NormParams, masked: bool = False) -> Request:
    """What a kernel has to support; `dtype` is that of x, and of `params` the shapes count."""
    return Request(
        block=spec.layout.block,
        dtype=dtype,
        result_dtype=spec.dtype,
        subtract_mean=spec.subtract_mean,
        param_blocks=_param_blocks(spec, params),
        adds=spec.adds,
        masked=masked,
        over_devices=bool(spec.statistics_devices.names),
    )


def over_batch(spec: NormSpec, function: Callable, in_axes: Any) -> Callable:
    """The function of one example, for all the examples that `vmap` has added."""
    for _ in range(spec.batch_dims):
        function = jax.vmap(function, in_axes)
    return function


def value_by_kernel(
    kernel: Kernel,
    spec: NormSpec,
    x: jax.Array,
    residual: jax.Array | None,
    params: NormParams,
) -> list[jax.Array]:
    """The value; the axes that `vmap` has added are more examples of the block.

    Parameters that differ within every block are applied to what the kernel standardizes.
    """
    if _param_blocks(spec, params) is None:
        h, *others = value_by_kernel(kernel, spec, x, residual, NormParams())
        y = over_batch(spec, functools.partial(affine, spec), (0, None))(h, params)
        return [y, *others]
    scale, bias, blocks, block = _divided(spec, x, params)
    batch = x.shape[: spec.batch_dims]
    if blocks == math.prod(batch):
        # All have the same scale and bias.
        blocks, block = 1, (blocks * block[0], *block[1:])
    y, total, *stats = kernel.value(
        x,
        residual,
        scale,
        bias,
        block=block,
        batch=blocks,
        epsilon=spec.epsilon,
        subtract_mean=spec.subtract_mean,
    )
    shape = (*batch, *spec.layout.statistics_shape)
    return [y, *(a.reshape(shape) for a in stats if a is not None), *jax.tree.leaves(total)]


def cotangent_by_kernel(
    kernel: Kernel,
    spec: NormSpec,
    x: jax.Array,
    params: NormParams,
    stats: Sequence[jax.Array],
    dy: jax.Array,
    dtotal: jax.Array | None,
) -> list[jax.Array]:
    """The cotangents; along the axes that `vmap` has added, those of the parameters differ too."""
    if _param_blocks(spec, params) is None:

        def outside(x, stats, dy):
            h = standardized(spec, x, statistics_of(spec, stats))
            return jax.vjp(functools.partial(affine, spec), h, params)[1](dy)

        dh, dparams = over_batch(spec, outside, 0)(x, stats, dy)
        dx = cotangent_by_kernel(kernel, spec, x, NormParams(), stats, dh, dtotal)
        return [*dx, *(jax.tree.leaves(dparams) if spec.param_gradients else ())]
    scale, _, blocks, block = _divided(spec, x, params)
    batch = x.shape[: spec.batch_dims]
    n, _, g, _ = block
    *mean, _, rstd = (a.reshape(blocks, n, g) for a in stats)
    high, low = mean or (None, None)
    dx, *grads = kernel.cotangent(
        x,
        dy,
        dtotal,
        scale,
        high,
        low,
        rstd,
        block=block,
        batch=blocks,
        wanted=tuple(spec.param_gradients and param is not None for param in params),
    )
    return [
        dx,
        *(
            grad.reshape(*batch, *param.shape).astype(param.dtype)
            for grad, param in zip(grads, params, strict=True)
            if grad is not None and param is not None
        ),
    ]


def _param_blocks(spec: NormSpec, params: NormParams) -> int | None:
    """Into how many blocks x is divided, so that each has one scale and bias; None if it can't."""
    found = {spec.layout.param_blocks(param.shape) for param in params if param is not None}
    return (found or {1}).pop() if len(found) <= 1 else None


def _divided(
    spec: NormSpec, x: jax.Array, params: NormParams
) -> tuple[jax.Array | None, jax.Array | None, int, tuple[int, int, int, int]]:
    """Scale and bias as kernels take them, the number of blocks with one each, and such a block.

    The scale has its offset, in the arithmetic's dtype.
    """
    parts, block = _param_blocks(spec, params), spec.layout.block
    assert parts  # else the kernel had declined
    assert block
    batch = math.prod(x.shape[: spec.batch_dims])

    def flat(param):
        if param is None or parts == 1:
            return None if param is None else param.reshape(-1)
        return jnp.tile(param.reshape(parts, -1), (batch, 1))

    scale, bias = map(flat, params)
    if scale is not None and spec.scale_offset:
        scale = spec.prepare(scale) + spec.scale_offset
    n, s, g, k = block
    return scale, bias, batch * parts, (n // parts, s, g, k)
