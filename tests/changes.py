"""Globals that programs depend on and the key of `jax.jit` does not: what tests make of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from jaxnorm import kernels


@contextlib.contextmanager
def changes() -> Iterator[Callable[[Any, str, Any], None]]:
    """`change(owner, name, value)`: nothing that was compiled with another value is found."""
    with pytest.MonkeyPatch.context() as patch:

        def change(owner, name, value):
            patch.setattr(owner, name, value)
            jax.clear_caches()

        yield change
    jax.clear_caches()


def with_kernels(**entries: Any) -> dict[str, Any]:
    """The table of kernels with other entries."""
    return {**kernels.KERNELS, **entries}
