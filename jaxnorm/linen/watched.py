"""What each batch norm of a linen model sees in training mode."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm._programs import Keyed
from jaxnorm._seen import Seen, look, merge_seen, names_here, nothing_seen
from jaxnorm.linen.norms import BatchNorm
from jaxnorm.linen.replaced import made, replaced

_NAME = "seen by jaxnorm"
Path = tuple[str, ...]


def check_model(model: Any, variables: Any) -> None:
    """A model of linen, and its variables."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a linen module, got {type(model).__name__}; of an nnx model, use "
            "jaxnorm.nnx."
        )
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables must be what init returns, got {type(variables).__name__}; pass it as the "
            "second argument."
        )


def keyed(model: nn.Module) -> Keyed:
    """A model that equals another if their programs are the same.

    Modules with lists can't be hashed, and modules that share a part equal those that have two.
    """
    seen: dict[int, int] = {}

    def key(value):
        if isinstance(value, nn.Module):
            if id(value) in seen:
                return seen[id(value)]
            seen[id(value)] = len(seen)
            names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
            return type(value), tuple((name, key(getattr(value, name, None))) for name in names)
        if isinstance(value, Mapping):
            return type(value), tuple((name, key(part)) for name, part in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(map(key, value))
        return value

    return Keyed(key(model), model)


def watched_call(
    model: nn.Module, variables: Any, arguments: tuple, call: dict[str, Any]
) -> tuple[dict[Path, Seen], dict[Path, nn.Module]]:
    """Call a model, and return what each of its batch norms saw in training mode, by its path.

    And those that were called by their paths, in the order of their first calls. Flax's batch norms
    compute as ours. Nothing that the call changes is kept.
    """
    modules: dict[Path, nn.Module] = {}
    stats: dict[Path, Any] = flatten_dict(variables.get("batch_stats", {}))
    norms = norms_of(stats)
    # In place before the call, so that nn.scan may carry it. Other transformations stack it as they
    # do the statistics.
    stats |= {(*path, _NAME): nothing_seen(stats[(*path, "mean")]) for path in norms}
    variables = {**variables, "batch_stats": unflatten_dict(stats)}
    with replaced(), nn.intercept_methods(_watch(modules)):
        _, updates = model.apply(variables, *arguments, **call, mutable=DenyList("params"))
    stats = flatten_dict(updates["batch_stats"])
    return {path: stats[(*path, _NAME)] for path in norms}, modules


def norms_of(stats: dict[Path, Any]) -> list[Path]:
    """The paths of all that have a running mean and variance."""
    return [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]


def _watch(modules: dict[Path, nn.Module]) -> Callable:
    """An interceptor that puts what is seen among the running statistics."""
    looks = 0

    def watch(next_call, args, kwargs, context):
        nonlocal looks
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
            return next_call(*args, **kwargs)
        name = names_here(module.axis_name, module.axis_index_groups)
        if name != module.axis_name and type(module) is BatchNorm:
            return made(BatchNorm, module, axis_name=name)(*args, **kwargs)
        modules.setdefault(module.path, module.clone(parent=None))
        before = looks
        y = next_call(*args, **kwargs)
        last = module.get_variable("batch_stats", _NAME)
        # Where a subclass calls the class that it inherits from, that one has looked: at what it
        # normalized.
        if last is not None and looks == before and _trains(module, *args, **kwargs):
            looks += 1
            x, shape = args[0] if args else kwargs["x"], last.examples.shape
            seen = look(x, shape, module.axis, kwargs.get("mask"), name)
            module.put_variable("batch_stats", _NAME, merge_seen(last, seen))
        return y

    return watch


def _trains(module: Any, x: Any = None, use_running_average: bool | None = None, **_: Any) -> bool:
    """Whether a call with these arguments uses the statistics of the batch."""
    if getattr(module, "frozen", False):
        return False
    return not nn.merge_param(
        "use_running_average", module.use_running_average, use_running_average
    )
