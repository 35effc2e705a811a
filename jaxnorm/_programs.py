"""Programs of a whole model, traced and compiled once for each kind of call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_ARRAY = object()


def once(make: Callable) -> Callable:
    """Remember what a function of static arguments made, such as a compiled program.

    Arguments that can't be hashed are not remembered: with them, it is made anew.
    """
    remembered = functools.lru_cache(maxsize=32)(make)

    def made(*static: Any) -> Any:
        try:
            hash(static)
        except TypeError:
            return make(*static)
        return remembered(*static)

    return made


@dataclasses.dataclass(frozen=True)
class Keyed:
    """A static argument that equals those of the same key."""

    key: Any
    value: Any = dataclasses.field(compare=False)


class Fixed(NamedTuple):
    """Arguments by name, without their arrays: what a program is compiled for."""

    tree: Any
    leaves: tuple

    def named(self, arrays: list[jax.Array]) -> dict[str, Any]:
        """The arguments with these arrays."""
        each = iter(arrays)
        return self.tree.unflatten(next(each) if leaf is _ARRAY else leaf for leaf in self.leaves)


def split(named: dict[str, Any]) -> tuple[Fixed, list[jax.Array]]:
    """The arguments without their arrays, and these."""
    leaves, tree = jax.tree.flatten(named)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    pairs = list(zip(leaves, is_array, strict=True))
    fixed = Fixed(tree, tuple(_ARRAY if array else leaf for leaf, array in pairs))
    return fixed, [leaf for leaf, array in pairs if array]


@jax.tree_util.register_static
class Noted:
    """What was noted while a program was traced, as one of its results."""

    def __init__(self, value: Any):
        """Any value."""
        self.value = value
