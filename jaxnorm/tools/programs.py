"""Programs that call a whole model, compiled once for each set of static arguments."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_ARRAY = object()


def memoize(make: Callable) -> Callable:
    """Cache the results of a function of static arguments, such as compiled programs.

    If an argument can't be hashed, call the function each time.
    """
    cached = functools.lru_cache(maxsize=32)(make)

    def call(*static: Any) -> Any:
        try:
            hash(static)
        except TypeError:
            return make(*static)
        return cached(*static)

    return call


@dataclasses.dataclass(frozen=True)
class StaticByKey:
    """A static argument, equal to any other that has the same key."""

    key: Any
    value: Any = dataclasses.field(compare=False)


class StaticArguments(NamedTuple):
    """Keyword arguments without their arrays: the part that a program is compiled for."""

    tree: Any
    leaves: tuple

    def combine(self, arrays: list[jax.Array]) -> dict[str, Any]:
        """Return the keyword arguments with these arrays."""
        rest = iter(arrays)
        return self.tree.unflatten(next(rest) if leaf is _ARRAY else leaf for leaf in self.leaves)


def partition(arguments: dict[str, Any]) -> tuple[StaticArguments, list[jax.Array]]:
    """Separate keyword arguments into a static part and their arrays."""
    leaves, tree = jax.tree.flatten(arguments)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    pairs = list(zip(leaves, is_array, strict=True))
    static = StaticArguments(tree, tuple(_ARRAY if array else leaf for leaf, array in pairs))
    return static, [leaf for leaf, array in pairs if array]


@jax.tree_util.register_static
class StaticResult:
    """A result of a traced function that is known while it is traced."""

    def __init__(self, value: Any):
        """Store any value."""
        self.value = value


def model_arguments(batch: Any) -> tuple:
    """Return the positional arguments of a model: a batch is a tuple of them, or a single one."""
    return batch if type(batch) is tuple else (batch,)


def display_path(path: str) -> str:
    """Return a path for messages: the model itself has an empty path."""
    return path or "the model"
