"""Signatures as those of Flax, which its transformations read."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def flax_positions(f: F) -> F:
    """Show the keyword-only arguments of a function as `**given`.

    `nnx.vmap(norm)` and `nnx.remat(norm)` pass each argument of the signature by position, also
    those that have a default and are not given. A keyword-only one fails, and with more positions
    than Flax's, `in_axes` would not fit. To pass such an argument, transform a function that calls
    the norm.
    """
    passed = inspect.signature(f).parameters.values()
    positions = [parameter for parameter in passed if parameter.kind is not parameter.KEYWORD_ONLY]
    given = inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)
    f.__signature__ = inspect.Signature([*positions, given])  # pyright: ignore[reportFunctionMemberAccess]
    return f


def after(inherited: Callable) -> Callable[[Callable], Callable]:
    """Give a function the signature of `inherited`, and its own keywords after it."""

    def decorate(f: Any) -> Any:
        passed, own = (inspect.signature(g).parameters.values() for g in (inherited, f))
        keywords = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        f.__signature__ = inspect.Signature([*passed, *keywords])
        return f

    return decorate
