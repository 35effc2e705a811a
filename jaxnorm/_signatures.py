"""Signatures of methods that replace those of Flax and Equinox; transformations read them."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def inherit_signature(inherited: Callable) -> Callable[[F], F]:
    """Give a function the signature of `inherited`, and its own keywords after that.

    An own keyword that `inherited` has too takes its place, with its own default.
    """

    def decorate(f: Any) -> Any:
        passed = dict(inspect.signature(inherited).parameters)
        for name, parameter in inspect.signature(f).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                passed[name] = parameter
        f.__signature__ = inspect.Signature([*passed.values()])
        return f

    return decorate


def flax_positions(f: F) -> F:
    """Show the keyword-only arguments of a function as `**given`.

    `nnx.vmap(norm)` and `nnx.remat(norm)` pass each argument of the signature by position, even if
    it has a default and is not given. A keyword-only argument fails there, and with more positions
    than Flax's method has, `in_axes` would not fit. To pass such an argument, transform a function
    that calls the norm.
    """
    passed = inspect.signature(f).parameters.values()
    positions = [parameter for parameter in passed if parameter.kind is not parameter.KEYWORD_ONLY]
    given = inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)
    f.__signature__ = inspect.Signature([*positions, given])  # pyright: ignore[reportFunctionMemberAccess]
    return f
