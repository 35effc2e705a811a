"""The kernel for CPUs, in C++, called through XLA's foreign function interface.

The arrays of all five norms are a block (n, s, g, k) in memory: n independent examples, s
positions, g groups of k features. Statistics are shared over s and k. rows.h has the norms of rows
(s = 1: layer and rms norm), which may add a residual; columns.h has the others.
"""

import ctypes
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.kernels.request import Request, common_unsupported_reason

LIBRARY = Path(__file__).with_name("_norms.so")
WHY_NOT_BUILT = Path(__file__).with_name("_not_built.txt")
_NOTHING = jax.ShapeDtypeStruct((0,), jnp.float32)  # for a result that is not computed
_LONGEST_SUM = 2**14  # kLongestSum in norms.h


@functools.cache
def unavailable_reason() -> str | None:
    """Return why the kernel can't be used here, or None if it can; load and register it."""
    if not LIBRARY.exists():
        if WHY_NOT_BUILT.exists():
            state = f"is not in the wheel of jaxnorm, because {WHY_NOT_BUILT.read_text()}"
        else:
            state = "has not been built"
        return f"it {state}: run python -m jaxnorm.kernels.cpu.build"
    try:
        library = _library()
        if library.jaxnorm_api_version() > _api_version():
            return "it was built for a newer jaxlib than this one: install jaxnorm again"
        for name in ("forward", "backward"):
            function = getattr(library, f"jaxnorm_{name}")
            jax.ffi.register_ffi_target(
                f"jaxnorm_{name}", jax.ffi.pycapsule(function), platform="cpu"
            )
    except (OSError, AttributeError, IndexError) as error:
        return f"its library can't be loaded: {error}"
    return None


def _api_version() -> int:
    """Return the version of the installed XLA's interface, from the headers of jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0])
        for part in ("MAJOR", "MINOR")
    )
    return major * 1000 + minor


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.jaxnorm_target.restype = ctypes.c_char_p
    library.jaxnorm_use_target.restype = ctypes.c_bool
    return library


def target() -> str:
    """Return the hardware that runs: the best of the library's targets for this processor."""
    return _library().jaxnorm_target().decode()


def use_target(name: str) -> bool:
    """Use another target for all later calls; return False if this processor does not support it.

    The target is chosen when a program runs, so this changes compiled programs too.
    """
    return _library().jaxnorm_use_target(name.encode())


def opt_in_reason() -> None:
    """Return None: the kernel is the default on all CPUs. docs/benchmarks.md has its times."""


@functools.cache
def unsupported_reason(request: Request) -> str | None:
    """Return why the kernel does not support such a call, or None if it does."""
    if reason := common_unsupported_reason(request):
        return reason
    block = request.block
    if block is None:
        return (
            "the features are not the last axes, or the elements that share statistics are not "
            "side by side in memory"
        )
    if request.param_blocks is None and request.dtype != jnp.float32:
        # To apply them to the kernel's result would round y twice.
        return (
            "scale and bias must differ only between features, or between features and equal runs "
            "of examples, and here they differ along other axes"
        )
    if not request.subtract_mean and block[1] > 1:
        return "it supports rms norm over the last axes only"
    if request.has_residual and block[1] > 1:
        return "it supports a residual only if the last axes share statistics"
    if request.has_residual and request.dtype == jnp.bfloat16 and block[3] > _LONGEST_SUM:
        return f"it supports a residual in bfloat16 for rows of up to {_LONGEST_SUM} elements"
    if request.exported:
        return "an exported program must run where jaxnorm's kernels are not built"
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
    """Return y, the residual sum and the statistics of `batch` blocks."""
    n, _, g, _ = block
    statistic = jax.ShapeDtypeStruct((batch, n, g), jnp.float32)
    mean = statistic if subtract_mean else _NOTHING
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    residual_sum = _NOTHING if residual is None else like_x
    y, residual_sum, high, low, var, rstd = jax.ffi.ffi_call(
        "jaxnorm_forward", [like_x, residual_sum, mean, mean, statistic, statistic]
    )(
        x,
        _float32(None) if residual is None else residual,
        _float32(scale),
        _float32(bias),
        batch=np.int64(batch),
        **_attributes(block),
        epsilon=np.float64(epsilon),
        subtract_mean=subtract_mean,
    )
    return (
        y,
        None if residual is None else residual_sum,
        high if subtract_mean else None,
        low if subtract_mean else None,
        var,
        rstd,
    )


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
    _, _, g, k = block
    param_grad = jax.ShapeDtypeStruct((batch, g * k), jnp.float32)
    dx, *grads = jax.ffi.ffi_call(
        "jaxnorm_backward",
        [
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *(param_grad if is_wanted else _NOTHING for is_wanted in wanted),
        ],
    )(
        x,
        dy,
        _float32(None) if d_residual_sum is None else d_residual_sum,
        _float32(scale),
        _float32(mean_high),
        _float32(mean_low),
        rstd,
        batch=np.int64(batch),
        **_attributes(block),
        subtract_mean=mean_high is not None,
    )
    dscale, dbias = (
        grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)
    )
    return dx, dscale, dbias


def _float32(a: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if a is None else a.astype(jnp.float32)


def _attributes(block: tuple[int, int, int, int]) -> dict[str, np.int64]:
    return {name: np.int64(size) for name, size in zip("nsgk", block, strict=True)}
