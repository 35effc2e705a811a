"""The static description of a norm's call, and the checks that all kernels share."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp


class Request(NamedTuple):
    """A call of a norm: the static properties that a kernel may support or not.

    Attributes:
      block: (n, s, g, k), or None if x is not such a block in memory.
      dtype: of x.
      result_dtype: of y.
      subtract_mean: whether the mean is subtracted.
      param_blocks: the number of blocks, each of fewer examples, that x divides into if each block
        has one scale and one bias. None if x does not divide so: scale and bias are then applied to
        the kernel's result.
      has_residual: whether a residual is added to x, and the sum is normalized.
      masked: whether there is a mask.
      over_devices: whether the statistics are shared over devices.
      exported: whether the program may run where jaxnorm is not installed.
    """

    block: tuple[int, int, int, int] | None
    dtype: Any
    result_dtype: Any
    subtract_mean: bool = True
    param_blocks: int | None = 1
    has_residual: bool = False
    masked: bool = False
    over_devices: bool = False
    exported: bool = False


def common_unsupported_reason(request: Request) -> str | None:
    """Return why no kernel supports the call, or None if one may."""
    if request.over_devices:
        return "it does not support an axis_name"
    if request.masked:
        return "it does not support masks"
    dtype, result_dtype = request.dtype, request.result_dtype
    if dtype not in (jnp.float32, jnp.bfloat16) or result_dtype != dtype:
        return (
            "it supports float32 or bfloat16, the same for x and the result, and x is "
            f"{dtype}, the result {result_dtype}"
        )
    if request.block and not math.prod(request.block):
        return "x has no elements"
    return None


def rows_of(block: tuple[int, int, int, int] | None) -> tuple[int, int] | None:
    """Return the number and length of rows if each row has its own statistics, else None."""
    if block is None or block[1] > 1 or block[2] > 1:
        return None
    return block[0], block[3]


def param_blocks_unsupported_reason(request: Request) -> str | None:
    """Return why a kernel with one scale and bias for all examples lacks support, or None."""
    if request.param_blocks == 1:
        return None
    return "it supports only one scale and one bias for all examples"
