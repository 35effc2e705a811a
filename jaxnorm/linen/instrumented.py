"""Calls of linen models that record the moments of batches, for each batch norm in training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.core import DenyList
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm.linen.norms import BatchNorm
from jaxnorm.linen.replaced import made, replaced
from jaxnorm.tools.batch_moments import (
    BatchMoments,
    bound_axis_name,
    merge_batch_moments,
    no_batch_moments,
    observe,
)
from jaxnorm.tools.programs import StaticByKey

_NAME = "jaxnorm_batch_moments"
Path = tuple[str, ...]


def check_model(model: Any, variables: Any) -> None:
    """Check that this is a linen module, and its variables."""
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


def by_structure(model: nn.Module) -> StaticByKey:
    """Make a model a static argument, equal to every model that computes the same program.

    Modules with lists can't be hashed, and modules that share a part equal those that have two.
    """
    places: dict[int, int] = {}

    def key(value):
        if isinstance(value, nn.Module):
            if id(value) in places:
                return places[id(value)]
            places[id(value)] = len(places)
            names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
            return type(value), tuple((name, key(getattr(value, name, None))) for name in names)
        if isinstance(value, Mapping):
            return type(value), tuple((name, key(part)) for name, part in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(map(key, value))
        return value

    return StaticByKey(key(model), model)


def instrumented_call(
    model: nn.Module, variables: Any, arguments: tuple, call: dict[str, Any]
) -> tuple[dict[Path, BatchMoments], dict[Path, nn.Module]]:
    """Call a model; return the moments that its batch norms measured in training, by their paths.

    The second result holds the batch norms that were called, in the order of their first calls.
    Flax's batch norms compute as ours. No change of the variables is kept.
    """
    called: dict[Path, nn.Module] = {}
    stats: dict[Path, Any] = flatten_dict(variables.get("batch_stats", {}))
    norms = norms_of(stats)
    # Add the variables before the call, so that nn.scan can carry them. Other transformations stack
    # them like the statistics.
    stats |= {(*path, _NAME): no_batch_moments(stats[(*path, "mean")]) for path in norms}
    variables = {**variables, "batch_stats": unflatten_dict(stats)}
    with replaced(), nn.intercept_methods(_observer(called)):
        _, updates = model.apply(variables, *arguments, **call, mutable=DenyList("params"))
    stats = flatten_dict(updates["batch_stats"])
    return {path: stats[(*path, _NAME)] for path in norms}, called


def norms_of(stats: dict[Path, Any]) -> list[Path]:
    """Return the paths of all that have a running mean and variance."""
    return [path[:-1] for path in stats if path[-1] == "mean" and (*path[:-1], "var") in stats]


def _observer(called: dict[Path, nn.Module]) -> Callable:
    """Make an interceptor that stores the moments of batches beside the running statistics."""
    observations = 0

    def observed_call(next_call, args, kwargs, context):
        nonlocal observations
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
            return next_call(*args, **kwargs)
        name = bound_axis_name(module.axis_name, module.axis_index_groups)
        if name != module.axis_name and type(module) is BatchNorm:
            return made(BatchNorm, module, axis_name=name)(*args, **kwargs)
        called.setdefault(module.path, module.clone(parent=None))
        before = observations
        y = next_call(*args, **kwargs)
        last = module.get_variable("batch_stats", _NAME)
        # If a subclass calls its base class, the call of the base class has been observed: it has
        # the input that is normalized.
        if last is not None and observations == before and _trains(module, *args, **kwargs):
            observations += 1
            x, shape = args[0] if args else kwargs["x"], last.examples.shape
            new = observe(x, shape, module.axis, kwargs.get("mask"), name)
            module.put_variable("batch_stats", _NAME, merge_batch_moments(last, new))
        return y

    return observed_call


def _trains(module: Any, x: Any = None, use_running_average: bool | None = None, **_: Any) -> bool:
    """Return whether a call with these arguments uses the statistics of the batch."""
    if getattr(module, "frozen", False):
        return False
    return not nn.merge_param(
        "use_running_average", module.use_running_average, use_running_average
    )
