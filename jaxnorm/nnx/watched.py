"""What each batch norm of an nnx model sees in training mode."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from flax import nnx

from jaxnorm._internals import first_from
from jaxnorm._seen import look, merge_seen, names_here, nothing_seen
from jaxnorm.nnx.norms import BatchNorm
from jaxnorm.nnx.replace import make_ours, modules_of
from jaxnorm.nnx.signatures import after


class Seen(nnx.BatchStat):
    """A variable that transformations such as `nnx.vmap` treat as running statistics."""


_calls: ContextVar[dict[str, None]] = ContextVar("calls")


@contextlib.contextmanager
def calls_noted() -> Iterator[dict[str, None]]:
    """The paths of the watched norms that are called in this context, by their first calls."""
    token = _calls.set({})
    try:
        yield _calls.get()
    finally:
        _calls.reset(token)


def watched(model: nnx.Module) -> Any:
    """A copy of a model in training mode, whose batch norms keep what they see as `seen`.

    Flax's batch norms are ours in the copy.
    """
    copy = nnx.clone(model)
    copy.train()
    for path, norm in norms_of(copy).items():
        norm.seen = Seen(nothing_seen(norm.mean[...]))
        norm.path = path  # transformations of modules keep it
        if type(norm) is nnx.BatchNorm:
            make_ours(norm)
        object.__setattr__(norm, "__class__", _watching(type(norm)))
    return copy


def norms_of(model: nnx.Module) -> dict[str, Any]:
    """The batch norms of a model by their paths."""
    modules = modules_of(model).items()
    return {path: module for path, module in modules if isinstance(module, nnx.BatchNorm)}


def _watched(base: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """A class whose calls are watched."""

    class Watched(base):
        @after(base.__call__)
        def __call__(self: Any, x, *arguments, **options):
            self.axis_name = names_here(self.axis_name, self.axis_index_groups)
            _calls.get({}).setdefault(self.path)
            y = base.__call__(self, x, *arguments, **options)
            call = inspect.signature(base.__call__).bind(self, x, *arguments, **options).arguments
            chosen = first_from(
                call.get("use_running_average"), self.use_running_average, error_msg=""
            )
            if not (chosen or getattr(self, "frozen", False)):
                new = look(x, self.mean.shape, self.axis, call.get("mask"), self.axis_name)
                self.seen.set_value(merge_seen(self.seen.get_value(), new))
            return y

    return Watched


_OURS, _FLAX = _watched(BatchNorm), _watched(nnx.BatchNorm)


@functools.cache
def _watching(kind: type) -> type:
    """A class with a watched one behind it, which sees what a subclass has normalized."""
    base, watched = (BatchNorm, _OURS) if issubclass(kind, BatchNorm) else (nnx.BatchNorm, _FLAX)
    return watched if kind is base else type(kind.__name__, (kind, watched), {})
