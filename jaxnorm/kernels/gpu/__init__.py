"""The kernel for NVIDIA GPUs, in Pallas with its backend Mosaic GPU.

It supports layer and rms norm of rows that fit into registers. tiles.py divides rows into tiles,
registers.py loads and sums a tile, rows.py computes the norms.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxnorm.kernels.gpu.tiles import WIDTHS, tile
from jaxnorm.kernels.request import (
    Request,
    common_unsupported_reason,
    param_blocks_unsupported_reason,
    rows_of,
)

OLDEST_JAX = (0, 11)  # older versions can't interpret the kernel, so it is not tested with them
VERIFIED = "NVIDIA H100 80GB HBM3"  # the GPU on which it was right, and faster than XLA


@functools.cache
def unavailable_reason() -> str | None:
    """Return why the kernel can't be used here, or None if it can."""
    if jax.__version_info__ < OLDEST_JAX:
        needed = ".".join(map(str, OLDEST_JAX))
        return f"it needs jax {needed} or newer, and this is jax {jax.__version__}"
    return None


def target() -> str:
    """Return the hardware that the kernel is compiled for, and the compiler."""
    return "NVIDIA GPUs, by Pallas (Mosaic GPU)"


def opt_in_reason() -> str | None:
    """Return why the kernel is not the default here, or None if it is."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "there is no NVIDIA GPU here"
    for device in devices:
        if device.device_kind != VERIFIED:
            return f"it was verified on an {VERIFIED} only, and this is an {device.device_kind}"
    return None


@functools.cache
def unsupported_reason(request: Request) -> str | None:
    """Return why the kernel does not support such a call, or None if it does."""
    if reason := common_unsupported_reason(request) or param_blocks_unsupported_reason(request):
        return reason
    rows = rows_of(request.block)
    if rows is None:
        return "it supports layer and rms norm over the last axes only, of known sizes"
    if math.prod(rows) >= 2**31:
        return f"it supports fewer than 2**31 elements, and x has {math.prod(rows)}"
    if tile(*rows) is None:
        return f"it supports {WIDTHS}, and x has {rows[0]} rows of {rows[1]}"
    if request.exported:
        return "Mosaic's code may not run with another version of JAX"
    return None


def forward(
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
    """Return y, the residual sum and the statistics."""
    from jaxnorm.kernels.gpu import rows  # Pallas takes a second to import

    n, k = batch * block[0], block[3]
    y, residual_sum, *mean, var, rstd = rows.forward(
        x.reshape(n, k),
        None if residual is None else residual.reshape(n, k),
        _row(scale),
        _row(bias),
        epsilon=epsilon,
        subtract_mean=subtract_mean,
    )
    residual_sum = None if residual_sum is None else residual_sum.reshape(x.shape)
    high, low = (None if a is None else a.reshape(n, 1) for a in mean)
    return y.reshape(x.shape), residual_sum, high, low, var.reshape(n, 1), rstd.reshape(n, 1)


def vjp(
    x: jax.Array,
    dy: jax.Array,
    d_residual_sum: jax.Array | None,
    scale: jax.Array | None,
    mean_high: jax.Array | None,
    mean_low: jax.Array | None,
    rstd: jax.Array,
    *,
    block: tuple[int, int, int, int],
    batch: int,
    wanted: tuple[bool, ...],
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return the gradients of `batch` blocks."""
    from jaxnorm.kernels.gpu import rows

    n, _, _, k = block
    shape = (batch * n, k)
    dx, dscale, dbias = rows.vjp(
        x.reshape(shape),
        dy.reshape(shape),
        None if d_residual_sum is None else d_residual_sum.reshape(shape),
        _row(scale),
        None if mean_high is None else mean_high.reshape(-1),
        None if mean_low is None else mean_low.reshape(-1),
        rstd.reshape(-1),
        batch=batch,
        wanted=wanted,
    )
    return dx.reshape(x.shape), dscale, dbias


def _row(a: jax.Array | None) -> jax.Array | None:
    return None if a is None else a.astype(jnp.float32)[None]
