"""Replacement of Flax's norms by jaxnorm's in calls of linen models."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from jaxnorm._modules import replacements
from jaxnorm.linen import norms

_OURS = replacements(nn, norms)


@contextlib.contextmanager
def replaced() -> Iterator[list[tuple[str, str]]]:
    """Compute Flax's norms by `jaxnorm.linen` within this context.

    For models whose code names `flax.linen`. `init`, `apply` and what JAX traces in the context use
    our norms, with the arguments and variables of Flax's. A function that JAX compiled before keeps
    Flax's, and one that it compiles in the context keeps ours. A subclass of Flax's norm may
    compute something else, so it stays.

    Yields:
      A list of the path and the class of each subclass that was called, and stays.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxnorm.linen
      >>> model, x = nn.Sequential([nn.Dense(4), nn.LayerNorm()]), jnp.ones((2, 3))
      >>> with jaxnorm.linen.replaced() as left:
      ...     variables = model.init(jax.random.key(0), x)
      ...     y = jax.jit(model.apply)(variables, x)
      >>> left
      []
    """
    left: list[tuple[str, str]] = []

    def replace(next_call, args, kwargs, context):
        module, kind = context.module, type(context.module)
        if context.method_name != "__call__" or not isinstance(module, tuple(_OURS)):
            return next_call(*args, **kwargs)
        if kind in _OURS:
            return made(_OURS[kind], module)(*args, **kwargs)
        found = "/".join(module.path), kind.__name__
        if not isinstance(module, tuple(_OURS.values())) and found not in left:
            left.append(found)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(replace):
        yield left


def made(kind: type[nn.Module], module: nn.Module, **changes: Any) -> Any:
    """Make a module of a class with the arguments and variables of a bound module."""
    names = [field.name for field in dataclasses.fields(module) if field.init]
    arguments = {name: getattr(module, name) for name in names if name not in ("parent", "name")}
    return kind(**arguments | changes, parent=module.scope)
