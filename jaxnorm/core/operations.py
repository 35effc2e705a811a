"""The three operations of a norm, each by a formula, and two of them by a kernel.

    forward(x, residual, params)                      -> y, statistics, residual_sum
    jvp(x, params, statistics, tx, tparams)           -> ty, t_statistics, t_residual_sum
    vjp(x, params, statistics, dy, d_residual_sum)    -> dx, dparams

`jvp` is linear in its tangents, and `vjp` is its transpose. Without a residual there is no residual
sum. With one, `forward` adds it to x. `jvp` and `vjp` then differentiate the norm of the residual
sum, which they get as x; tx is its tangent.

The formula is the reference: `jvp` is that of standardize.py and `vjp` its transpose, so the
derivatives are written once. A kernel computes `forward` or `vjp` of the block (n, s, g, k) that x
is in memory. This file alone converts the objects of `core` to the arrays and numbers that kernels
take.

All functions take a `NormSpec` first, and return lists of arrays.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm.core.counts import count_all
from jaxnorm.core.moments import Statistics
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams, affine, measure_and_standardize, norm_jvp
from jaxnorm.core.statistics import Residuals, compute_x_hat
from jaxnorm.kernels import Kernel
from jaxnorm.kernels.request import Request


def arrays_of(stats: Statistics) -> list[jax.Array]:
    """Return the arrays of the statistics, without the count: the shape gives it."""
    return jax.tree.leaves(stats._replace(count=None))


def statistics_of(spec: NormSpec, arrays: Sequence[jax.Array]) -> Statistics:
    """Undo `arrays_of`."""
    *mean, var, rstd = arrays
    high, low = mean or (None, None)
    return Statistics(high, low, var, jnp.broadcast_to(count_all(spec), var.shape), rstd)


def forward(
    spec: NormSpec, x: jax.Array, residual: jax.Array | None, params: NormParams
) -> list[jax.Array]:
    """Compute y, the statistics, and the residual sum."""
    y, stats, residual_sum = measure_and_standardize(spec, x, residual, params)
    return [y, *arrays_of(stats), *jax.tree.leaves(residual_sum)]


def jvp(spec, x, params, stats, tx, tparams) -> list[jax.Array]:
    """Compute the tangents of y, the statistics and the residual sum; `tparams` None is zero."""
    tparams = jax.tree.map(jnp.zeros_like, params) if tparams is None else tparams
    residuals = Residuals(x, None, None, statistics_of(spec, stats), params)
    ty, t_stats, t_residual_sum = norm_jvp(spec, residuals, tx, tparams)
    return [ty, *arrays_of(t_stats), *jax.tree.leaves(t_residual_sum)]


def vjp(spec, x, params, stats, dy, d_residual_sum) -> list[jax.Array]:
    """Compute the cotangents of x and, if wanted, the parameters; `d_residual_sum` None is zero."""

    def linear(tx, tparams):
        results = jvp(spec, x, params, stats, tx, tparams)
        return results[0], None if d_residual_sum is None else results[-1]

    dx, dparams = jax.linear_transpose(linear, x, params)((dy, d_residual_sum))
    return [dx, *(jax.tree.leaves(dparams) if spec.param_gradients else ())]


def request(spec: NormSpec, dtype: jnp.dtype, params: NormParams, masked: bool = False) -> Request:
    """Describe a call for kernels. `dtype` is that of x; of `params` only the shapes matter."""
    return Request(
        block=spec.layout.block,
        dtype=dtype,
        result_dtype=spec.dtype,
        subtract_mean=spec.subtract_mean,
        param_blocks=_param_blocks(spec, params),
        has_residual=spec.has_residual,
        masked=masked,
        over_devices=bool(spec.statistics_devices.names),
    )


def over_batch(spec: NormSpec, function: Callable, in_axes: Any) -> Callable:
    """Map a function of one example over the batch dimensions that `vmap` has added."""
    for _ in range(spec.batch_dims):
        function = jax.vmap(function, in_axes)
    return function


def forward_by_kernel(
    kernel: Kernel,
    spec: NormSpec,
    x: jax.Array,
    residual: jax.Array | None,
    params: NormParams,
) -> list[jax.Array]:
    """Call `forward` of the kernel; axes that `vmap` has added are more examples of the block.

    The kernel takes parameters that are constant within a block. Others are applied to its result.
    """
    if _param_blocks(spec, params) is None:
        x_hat, *others = forward_by_kernel(kernel, spec, x, residual, NormParams())
        y = over_batch(spec, functools.partial(affine, spec), (0, None))(x_hat, params)
        return [y, *others]
    scale, bias, blocks, block = _divided(spec, x, params)
    batch = x.shape[: spec.batch_dims]
    if blocks == math.prod(batch):
        # All have the same scale and bias.
        blocks, block = 1, (blocks * block[0], *block[1:])
    y, residual_sum, *stats = kernel.forward(
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
    return [y, *(a.reshape(shape) for a in stats if a is not None), *jax.tree.leaves(residual_sum)]


def vjp_by_kernel(
    kernel: Kernel,
    spec: NormSpec,
    x: jax.Array,
    params: NormParams,
    stats: Sequence[jax.Array],
    dy: jax.Array,
    d_residual_sum: jax.Array | None,
) -> list[jax.Array]:
    """Call `vjp` of the kernel; parameters have a gradient for each index that `vmap` has added."""
    if _param_blocks(spec, params) is None:

        def outside(x, stats, dy):
            x_hat = compute_x_hat(spec, x, statistics_of(spec, stats))
            return jax.vjp(functools.partial(affine, spec), x_hat, params)[1](dy)

        d_x_hat, dparams = over_batch(spec, outside, 0)(x, stats, dy)
        dx = vjp_by_kernel(kernel, spec, x, NormParams(), stats, d_x_hat, d_residual_sum)
        return [*dx, *(jax.tree.leaves(dparams) if spec.param_gradients else ())]
    scale, _, blocks, block = _divided(spec, x, params)
    batch = x.shape[: spec.batch_dims]
    n, _, g, _ = block
    *mean, _, rstd = (a.reshape(blocks, n, g) for a in stats)
    high, low = mean or (None, None)
    dx, *grads = kernel.vjp(
        x,
        dy,
        d_residual_sum,
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
    """Return into how many blocks x is divided so that each has one scale and bias, or None."""
    found = {spec.layout.param_blocks(param.shape) for param in params if param is not None}
    return (found or {1}).pop() if len(found) <= 1 else None


def _divided(
    spec: NormSpec, x: jax.Array, params: NormParams
) -> tuple[jax.Array | None, jax.Array | None, int, tuple[int, int, int, int]]:
    """Return scale and bias as kernels take them, the number of blocks, and the shape of each.

    The scale includes its offset, in the dtype of the arithmetic.
    """
    parts, block = _param_blocks(spec, params), spec.layout.block
    assert parts  # else the kernel does not support the call
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
