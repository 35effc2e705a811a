"""The CPU's kernel, in C++, called through XLA's foreign function interface.

It sees an array in memory as a block (n, s, g, k), n examples of s positions of g groups of k
features (`Layout.block`), which all five norms are; statistics are shared over s and k. rows.h has
the norms of rows (s = 1: layer, rms), columns.h the others.
"""

import ctypes
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LIBRARY = Path(__file__).with_name("_norms.so")
WHY_NOT_BUILT = Path(__file__).with_name("_not_built.txt")
_NOTHING = jax.ShapeDtypeStruct((0,), jnp.float32)  # a result that is not wanted


@functools.cache
def missing() -> str | None:
    """Why there is no kernel here, or None: then it is loaded."""
    if not LIBRARY.exists():
        if WHY_NOT_BUILT.exists():
            return WHY_NOT_BUILT.read_text()
        return "it has not been built: run python -m jaxnorm.kernels.cpu.build"
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
    """That of the XLA that runs here, from the headers that come with it."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{part} (\d+)", header)[0])
        for part in ("MAJOR", "MINOR")
    )
    return major * 1000 + minor


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.jaxnorm_level.restype = ctypes.c_char_p
    library.jaxnorm_use_level.restype = ctypes.c_bool
    return library


def level() -> str:
    """What machine it is compiled for: of those that the library holds, the best that runs here."""
    return _library().jaxnorm_level().decode()


def use_level(name: str) -> bool:
    """Go over to another, for all that runs from now on; False if it doesn't run here."""
    return _library().jaxnorm_use_level(name.encode())


def declines(how: Any, dtype: Any, x: jax.Array, where: Any) -> str | None:
    """Why it does not take these, or None."""
    if how.devices.names:
        return "it does not share statistics over an axis_name"
    if where is not None:
        return "it takes no mask"
    if x.dtype not in (jnp.float32, jnp.bfloat16) or dtype != x.dtype:
        return (
            "it takes float32 or bfloat16, for x and the result alike, and x is of "
            f"{x.dtype}, the result of {dtype}"
        )
    block = how.layout.block
    if block is None:
        return (
            "the features are not the last axes, or what shares statistics is not side by side "
            f"in memory (x has shape {how.layout.shape})"
        )
    if not how.centred and block[1] > 1:
        return "it takes rms norm over the last axes only"
    if not math.prod(block):
        return "x has no elements"
    return None


def value(setting: Any, x: jax.Array, params: Any) -> list[jax.Array]:
    """y and the statistics, as `primitives.value`."""
    how = setting.how
    maps = x.shape[: setting.maps]
    n, s, g, k = how.layout.block
    layout = how.layout
    sizes = tuple(1 if axis in layout.shared else size for axis, size in enumerate(layout.view))
    statistic = jax.ShapeDtypeStruct((*maps, *sizes), jnp.float32)
    mean = statistic if how.centred else _NOTHING
    y, mean, rest, var, rstd = jax.ffi.ffi_call(
        "jaxnorm_forward",
        [jax.ShapeDtypeStruct(x.shape, x.dtype), mean, mean, statistic, statistic],
    )(
        x,
        _features(params.scale),
        _features(params.bias),
        **_integers(n=n * math.prod(maps), s=s, g=g, k=k),
        epsilon=np.float64(how.epsilon),
        centred=how.centred,
    )
    return [y, *((mean, rest) if how.centred else ()), var, rstd]


def cotangent(
    setting: Any, x: jax.Array, params: Any, parts: list[jax.Array], dy: jax.Array
) -> list[jax.Array]:
    """The gradients of x and of the parameters, as `primitives.cotangent`."""
    how, maps = setting.how, x.shape[: setting.maps]
    n, s, g, k = how.layout.block
    *means, _, rstd = parts
    mean, rest = means or [_features(None)] * 2
    features = jax.ShapeDtypeStruct((*maps, g * k), jnp.float32)
    wanted = [features if setting.of_params and p is not None else _NOTHING for p in params]
    dx, *dparams = jax.ffi.ffi_call(
        "jaxnorm_backward", [jax.ShapeDtypeStruct(x.shape, x.dtype), *wanted]
    )(
        x,
        dy,
        _features(params.scale),
        mean,
        rest,
        rstd,
        **_integers(maps=math.prod(maps), n=n, s=s, g=g, k=k),
        centred=how.centred,
    )
    if not setting.of_params:
        return [dx]
    pairs = [(d, p) for d, p in zip(dparams, params, strict=True) if p is not None]
    return [dx, *(d.reshape(*maps, *p.shape).astype(p.dtype) for d, p in pairs)]


def _features(param: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if param is None else param.reshape(-1).astype(jnp.float32)


def _integers(**sizes: int) -> dict[str, np.int64]:
    return {name: np.int64(size) for name, size in sizes.items()}
