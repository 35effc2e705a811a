"""What each batch norm of a linen model sees in training mode."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from flax.core import DenyList
from flax.traverse_util import flatten_dict

from jaxnorm._seen import Seen, look, merge_seen, names_here
from jaxnorm.linen.norms import BatchNorm
from jaxnorm.linen.replaced import made, replaced

_NAME = "seen by jaxnorm"
Path = tuple[str, ...]


def watched_call(
    model: nn.Module, variables: Any, arguments: tuple, call: dict[str, Any]
) -> tuple[dict[Path, Seen], dict[Path, nn.Module]]:
    """Call a model, and return what each batch norm in training mode saw, by its path.

    And all batch norms by their paths, in the order of their first calls. Flax's batch norms
    compute as ours. Nothing that the call changes is kept.
    """
    modules: dict[Path, nn.Module] = {}
    with replaced(), nn.intercept_methods(_watch(modules)):
        _, updates = model.apply(variables, *arguments, **call, mutable=DenyList("params"))
    stats: dict[Path, Any] = flatten_dict(updates.get("batch_stats", {}))
    # A transformation of modules, such as nn.scan, stacks what is seen as it does the statistics.
    return {path[:-1]: seen for path, seen in stats.items() if path[-1] == _NAME}, modules


def _watch(modules: dict[Path, nn.Module]) -> Callable:
    """An interceptor that puts what is seen among the running statistics."""

    def watch(next_call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
            return next_call(*args, **kwargs)
        name = names_here(module.axis_name, module.axis_index_groups)
        if name != module.axis_name and type(module) is BatchNorm:
            return made(BatchNorm, module, axis_name=name)(*args, **kwargs)
        before = module.get_variable("batch_stats", "mean")
        modules.setdefault(module.path, module.clone(parent=None))
        y = next_call(*args, **kwargs)
        if before is not None and _trains(module, *args, **kwargs):
            x = args[0] if args else kwargs["x"]
            seen = look(x, before.shape, module.axis, kwargs.get("mask"), name)
            last = module.get_variable("batch_stats", _NAME)
            module.put_variable("batch_stats", _NAME, merge_seen(last, seen) if last else seen)
        return y

    return watch


def _trains(module: Any, x: Any = None, use_running_average: bool | None = None, **_: Any) -> bool:
    """Whether a call with these arguments uses the statistics of the batch."""
    if getattr(module, "frozen", False):
        return False
    return not nn.merge_param(
        "use_running_average", module.use_running_average, use_running_average
    )
