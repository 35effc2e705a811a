"""Copies of nnx models whose batch norms record the moments of their batches in training."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from flax import nnx

from jaxnorm._internals import first_from
from jaxnorm._signatures import inherit_signature
from jaxnorm.nnx.norms import BatchNorm
from jaxnorm.nnx.replace import make_ours, modules_of
from jaxnorm.tools.batch_moments import (
    bound_axis_name,
    merge_batch_moments,
    no_batch_moments,
    observe,
)


class ObservedMoments(nnx.BatchStat):
    """A variable of `BatchMoments`, which `nnx.vmap` and others treat as running statistics."""


_call_order: ContextVar[dict[str, None]] = ContextVar("call_order")


@contextlib.contextmanager
def call_order() -> Iterator[dict[str, None]]:
    """Collect the paths of instrumented norms in the order of their first calls."""
    token = _call_order.set({})
    try:
        yield _call_order.get()
    finally:
        _call_order.reset(token)


def instrumented(model: nnx.Module) -> Any:
    """Copy a model, in training mode; its batch norms have the variable `observed`.

    Flax's batch norms become ours in the copy.
    """
    copy = nnx.clone(model)
    copy.train()
    for path, norm in norms_of(copy).items():
        norm.observed = ObservedMoments(no_batch_moments(norm.mean[...]))
        norm.path = path  # transformations of modules keep it
        if type(norm) is nnx.BatchNorm:
            make_ours(norm)
        object.__setattr__(norm, "__class__", _instrumented_class(type(norm)))
    return copy


def norms_of(model: nnx.Module) -> dict[str, Any]:
    """Return the batch norms of a model by their paths."""
    modules = modules_of(model).items()
    return {path: module for path, module in modules if isinstance(module, nnx.BatchNorm)}


def _instrument(base: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    class Instrumented(base):
        @inherit_signature(base.__call__)
        def __call__(self: Any, x, *arguments, **options):
            self.axis_name = bound_axis_name(self.axis_name, self.axis_index_groups)
            _call_order.get({}).setdefault(self.path)
            y = base.__call__(self, x, *arguments, **options)
            call = inspect.signature(base.__call__).bind(self, x, *arguments, **options).arguments
            uses_running = first_from(
                call.get("use_running_average"), self.use_running_average, error_msg=""
            )
            if not (uses_running or getattr(self, "frozen", False)):
                new = observe(x, self.mean.shape, self.axis, call.get("mask"), self.axis_name)
                self.observed.set_value(merge_batch_moments(self.observed.get_value(), new))
            return y

    return Instrumented


_OURS, _FLAX = _instrument(BatchNorm), _instrument(nnx.BatchNorm)


@functools.cache
def _instrumented_class(kind: type) -> type:
    """Insert an instrumented class after `kind`, so that it records what `kind` normalizes."""
    base, instrumented = (
        (BatchNorm, _OURS) if issubclass(kind, BatchNorm) else (nnx.BatchNorm, _FLAX)
    )
    return instrumented if kind is base else type(kind.__name__, (kind, instrumented), {})
