"""What each batch norm of an nnx model sees in training mode."""

import functools
from typing import Any

from flax import nnx

from jaxnorm._seen import look, merge_seen, names_here, nothing_seen
from jaxnorm.nnx.replace import make_ours, modules_of


class Seen(nnx.BatchStat):
    """A variable that transformations such as `nnx.vmap` treat as running statistics."""


def watched(model: nnx.Module) -> Any:
    """A copy of a model in training mode, whose batch norms keep what they see as `seen`.

    Flax's batch norms are ours in the copy.
    """
    copy = nnx.clone(model)
    copy.train()
    for norm in norms_of(copy).values():
        norm.seen = Seen(nothing_seen(norm.mean[...]))
        if type(norm) is nnx.BatchNorm:
            make_ours(norm)
        object.__setattr__(norm, "__class__", _watching(type(norm)))
    return copy


def norms_of(model: nnx.Module) -> dict[str, Any]:
    """The batch norms of a model by their paths."""
    modules = modules_of(model).items()
    return {path: module for path, module in modules if isinstance(module, nnx.BatchNorm)}


@functools.cache
def _watching(kind: type) -> type:
    """The class whose calls are watched."""

    def __call__(self, x, use_running_average=None, **options):  # noqa: N807
        self.axis_name = names_here(self.axis_name, self.axis_index_groups)
        before = self.mean[...]
        y = kind.__call__(self, x, use_running_average, **options)
        chosen = self.use_running_average if use_running_average is None else use_running_average
        if not (chosen or getattr(self, "frozen", False)):
            new = look(x, before, self.axis, options.get("mask"), self.axis_name)
            self.seen.set_value(merge_seen(self.seen.get_value(), new))
        return y

    return type(kind.__name__, (kind,), {"__call__": __call__, "__doc__": kind.__doc__})
