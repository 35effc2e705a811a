"""Signatures of the methods that replace Flax's and Equinox's, for their transformations."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def inherit_signature(inherited: Callable) -> Callable[[F], F]:
    """Give a function the signature of `inherited`, followed by the function's own keywords.

    A keyword that both have keeps its position, with the default of the function.
    """

    def decorate(f: Any) -> Any:
        signature = inspect.signature(inherited)
        parameters = dict(signature.parameters)
        for name, own in inspect.signature(f).parameters.items():
            if own.kind is own.KEYWORD_ONLY:
                parameters[name] = parameters.get(name, own).replace(default=own.default)
        f.__signature__ = signature.replace(parameters=[*parameters.values()])
        return f

    return decorate


def flax_positions(f: F) -> F:
    """Show the keyword-only arguments of a function as `**kwargs` in its signature.

    `nnx.vmap(norm)` and `nnx.remat(norm)` pass each argument of the signature by position, even if
    it has a default and is not given. They fail for a keyword-only argument, and more positions
    than in Flax's method would not fit `in_axes`. To pass such an argument, transform a function
    that calls the norm.
    """
    parameters = inspect.signature(f).parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    kwargs = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    f.__signature__ = inspect.Signature([*positional, kwargs])  # pyright: ignore[reportFunctionMemberAccess]
    return f
