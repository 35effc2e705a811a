"""Support for exporters that trace a program of JAX, such as jax2onnx.

While they trace, such exporters replace functions of `jax.numpy` by functions with fewer arguments,
and they support only the primitives of JAX. For them a norm is traced by the formulas, for one
platform, with the original `jax.numpy`. It is not compiled, because JAX would use the compiled
program in later calls.

The functions of `jax.numpy` are global: while one thread exports, no other thread should trace. The
formulas are also used if a program replaces `jax.numpy.where` for another reason.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def _functions() -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in (jnp, lax)]


_ORIGINAL = _functions()
_exported = ContextVar("exported", default=False)


def exporter_traces() -> bool:
    """Return whether an exporter is tracing."""
    return _exported.get() or jnp.where is not _ORIGINAL[0]["where"]


def jit(function: Callable, static_argnums: int | tuple[int, ...] = ()) -> Callable:
    """Compile a function, unless an exporter is tracing."""
    compiled = jax.jit(function, static_argnums=static_argnums)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if not exporter_traces():
            return compiled(*args)
        with _original_numpy():
            return function(*args)

    return call


def platform_dependent(*args: jax.Array, default: Callable, **branches: Callable) -> Any:
    """Call `lax.platform_dependent`, or the default if an exporter is tracing."""
    if exporter_traces():
        return default(*args)
    return lax.platform_dependent(*args, default=default, **branches)


@contextlib.contextmanager
def _original_numpy() -> Iterator[None]:
    replaced, token = _functions(), _exported.set(True)
    _replace(_ORIGINAL)
    try:
        yield
    finally:
        _replace(replaced)
        _exported.reset(token)


def _replace(functions: list[dict[str, Any]]) -> None:
    for module, own in zip((jnp, lax), functions, strict=True):
        module.__dict__.update(own)
