"""Batch norms that keep their running statistics while the rest of a model trains."""

from collections.abc import Iterable
from typing import Any

from flax import nnx

from jaxnorm.nnx.instrumented import norms_of
from jaxnorm.nnx.norms import BatchNorm
from jaxnorm.nnx.replace import make_ours

Paths = str | Iterable[str] | None


def freeze(model: nnx.Module, where: Paths = None) -> list[str]:
    """Make batch norms use their running statistics, unchanged, until `unfreeze`; in place.

    `train()`, `nnx.view` and `use_running_average` of a call do not undo it. Flax's batch norms
    become ours, with the same variables. Scale and bias are still trained; to freeze them
    too, leave them out of what the optimizer changes (below).

    Args:
      model: any nnx module.
      where: a path, or several, of batch norms or of what holds them: "encoder" is all of those in
        `model.encoder`, "blocks.0.norm" is one. None: all.

    Returns:
      The paths of the frozen norms.

    Raises:
      TypeError: the model is not an nnx module, or a chosen norm is a subclass of Flax's but not of
        ours.
      ValueError: a path holds no batch norm, or there is none in the model.

    Examples:
      >>> import jaxnorm.nnx as jn, optax
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jn.BatchNorm(4, rngs=rngs))
      >>> frozen = jn.freeze(model)
      >>> model.train()
      >>> model.layers[1].frozen, frozen
      (True, ['layers.1'])

      Only the linear layer trains:

      >>> is_frozen = lambda path, _: ".".join(map(str, path[:-1])) in frozen
      >>> trained = nnx.All(nnx.Param, nnx.Not(is_frozen))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=trained)
      >>> gradient = nnx.grad(lambda model, x: model(x).sum(), argnums=nnx.DiffState(0, trained))
    """
    return _set(model, where, True)


def unfreeze(model: nnx.Module, where: Paths = None) -> list[str]:
    """Undo `freeze` for batch norms, in place; the arguments, result and errors are the same.

    The norms are then in the mode in which `train()` or `eval()` last put them.
    """
    return _set(model, where, False)


def _set(model: nnx.Module, where: Paths, frozen: bool) -> list[str]:
    norms = norms_of(model)
    if not norms:
        raise ValueError("model must have a batch norm, got none; there is nothing to freeze.")
    chosen = list(norms) if where is None else _chosen(model, norms, where)
    for path in chosen:
        kind = type(norms[path])
        if kind is not nnx.BatchNorm and not issubclass(kind, BatchNorm):
            raise TypeError(
                f"{path or 'the model'} must be a BatchNorm of jaxnorm or Flax, got the subclass "
                f"{kind.__name__} of Flax's; make it a subclass of jaxnorm.nnx.BatchNorm."
            )
    for path in chosen:
        if frozen and type(norms[path]) is nnx.BatchNorm:
            make_ours(norms[path])
        if isinstance(norms[path], BatchNorm):
            norms[path].frozen = frozen
    return chosen


def _chosen(model: nnx.Module, norms: dict[str, Any], where: Any) -> list[str]:
    """Return the paths of the norms in these places; a shared norm has one path."""
    places = [where] if isinstance(where, str) else where
    if not isinstance(places, Iterable) or not all(isinstance(place, str) for place in places):
        raise TypeError(
            f'where must be a path such as "encoder", several, or None, got {where!r}; write an '
            'index as in "blocks.0".'
        )
    inside = set()
    for place in places:
        found = {id(module) for _, module in nnx.iter_modules(_at(model, place))}
        if not any(id(norm) in found for norm in norms.values()):
            raise ValueError(
                f"where must be paths of batch norms or of what holds them, got {place!r}; there "
                f"are {', '.join(norms)}."
            )
        inside |= found
    return [path for path, norm in norms.items() if id(norm) in inside]


def _at(model: Any, path: str) -> Any:
    """Return the object at a path, or an empty module."""
    for name in path.split(".") if path else ():
        try:
            model = model[int(name)] if name.isdigit() else getattr(model, name)
        except (AttributeError, IndexError, KeyError, TypeError):
            try:
                model = model[name]
            except (IndexError, KeyError, TypeError):
                return nnx.Module()
    return model
