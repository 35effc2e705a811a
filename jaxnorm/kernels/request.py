"""What a kernel is asked for, and what all of ours decline."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp


class Request(NamedTuple):
    """A call of a norm, as a kernel sees it; static.

    Attributes:
      block: (n, s, g, k), or None if x is not such a block in memory.
      dtype: of x.
      result_dtype: of y.
      subtract_mean: whether the mean is subtracted.
      param_blocks: into how many such blocks of fewer examples x is divided if each is to have one
        scale and bias; None if no such division does that. Then the kernel gets neither: they are
        applied to its result.
      has_residual: whether a residual is added to x, and the sum is normalized.
      masked: whether some elements do not count.
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
    """Why none of the kernels supports it, or None."""
    if request.over_devices:
        return "it does not share statistics over an axis_name"
    if request.masked:
        return "it takes no mask"
    dtype, result_dtype = request.dtype, request.result_dtype
    if dtype not in (jnp.float32, jnp.bfloat16) or result_dtype != dtype:
        return (
            f"it takes float32 or bfloat16, for x and the result alike, and x is of {dtype}, the "
            f"result of {result_dtype}"
        )
    if request.block and not math.prod(request.block):
        return "x has no elements"
    return None


def rows_of(block: tuple[int, int, int, int] | None) -> tuple[int, int] | None:
    """The number of rows and their length, if statistics and parameters are those of rows."""
    if block is None or block[1] > 1 or block[2] > 1:
        return None
    return block[0], block[3]


def param_blocks_unsupported_reason(request: Request) -> str | None:
    """Why a kernel that takes one scale and bias for all examples declines, or None."""
    if request.param_blocks == 1:
        return None
    return "it takes one scale and bias for all examples"
