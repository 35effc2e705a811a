"""The kernel for NVIDIA GPUs, in Pallas, by its backend Mosaic GPU.

It takes layer and rms norm of rows that fit into registers. tiles.py divides them, registers.py
loads and sums a tile, rows.py computes it.
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

OLDEST_JAX = (0, 11)  # older ones can't interpret it, so it was not tested with them
PROVEN = "NVIDIA H100 80GB HBM3"  # the GPU that it was measured on


@functools.cache
def unavailable_reason() -> str | None:
    """Why there is no kernel here, or None if there is one."""
    if jax.__version_info__ < OLDEST_JAX:
        needed = ".".join(map(str, OLDEST_JAX))
        return f"it needs jax {needed} or newer, and this is jax {jax.__version__}"
    return None


def target() -> str:
    """What hardware it is compiled for, and by what."""
    return "NVIDIA GPUs, by Pallas (Mosaic GPU)"


def opt_in_reason() -> str | None:
    """Why it has to be asked for here, or None if it is used unasked."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return "there is no NVIDIA GPU here to run it by default"
    for device in devices:
        if device.device_kind != PROVEN:
            return f"it was measured on an {PROVEN} only, and here is an {device.device_kind}"
    return None


@functools.cache
def unsupported_reason(request: Request) -> str | None:
    """Why it does not support such a call, or None if it does."""
    if reason := common_unsupported_reason(request) or param_blocks_unsupported_reason(request):
        return reason
    rows = rows_of(request.block)
    if rows is None:
        return "it takes layer and rms norm over the last axes, of known sizes, only"
    if math.prod(rows) >= 2**31:
        return f"it takes fewer than 2**31 elements, and x has {math.prod(rows)}"
    if tile(*rows) is None:
        return f"it takes {WIDTHS}, and x has {rows[0]} rows of {rows[1]}"
    if request.exported:
        return "Mosaic's code is not promised to run by other versions of JAX than exported it"
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
    """y, the sum with the residual, and the statistics."""
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
    """The gradients, of `batch` blocks."""
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
