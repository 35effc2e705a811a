"""What each batch norm of an nnx model sees in training mode."""

import functools
import inspect
from typing import Any

from flax import nnx

from jaxnorm._internals import first_from
from jaxnorm._seen import look, merge_seen, names_here, nothing_seen
from jaxnorm.nnx.norms import BatchNorm
from jaxnorm.nnx.replace import make_ours, modules_of
from jaxnorm.nnx.signatures import after


class Seen(nnx.BatchStat):
    """A variable that transformations such as `nnx.vmap` treat as running statistics."""


class Turn:
    """The place of a batch norm in the order of calls. Transformations of modules keep it."""

    def __init__(self, path: str, order: dict[str, None]):
        """`order` is what all norms of a model have in common."""
        self.path = path
        self.order = order

    def take(self) -> None:
        """Take the next place; a norm that is called again keeps its own."""
        self.order.setdefault(self.path)


def watched(model: nnx.Module) -> tuple[Any, dict[str, None]]:
    """A copy of a model in training mode, whose batch norms keep what they see as `seen`.

    Flax's batch norms are ours in the copy. Second are the paths of those that have been called, in
    the order of their first calls.
    """
    copy = nnx.clone(model)
    copy.train()
    order: dict[str, None] = {}
    for path, norm in norms_of(copy).items():
        norm.seen = Seen(nothing_seen(norm.mean[...]))
        norm.turn = Turn(path, order)
        if type(norm) is nnx.BatchNorm:
            make_ours(norm)
        object.__setattr__(norm, "__class__", _watching(type(norm)))
    return copy, order


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
            self.turn.take()
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
