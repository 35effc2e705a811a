"""Batch norms that keep their running statistics while the rest of a model trains."""

from collections.abc import Iterable

from flax import nnx

from jaxnorm.nnx.norms import BatchNorm
from jaxnorm.nnx.replace import make_ours
from jaxnorm.nnx.watched import norms_of

Paths = str | Iterable[str] | None


def freeze(model: nnx.Module, where: Paths = None) -> list[str]:
    """Make batch norms use their running statistics, unchanged, until `unfreeze`; in place.

    `train()`, `nnx.view` and `use_running_average` of a call do not undo it. Flax's batch norms
    become ours, with the same variables. Scale and bias go on training: to keep them too, leave
    them out of what the optimizer changes (below).

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
    chosen = list(norms)
    if where is not None:
        parents = [where] if isinstance(where, str) else list(where)
        below = lambda path, parent: f"{path}.".startswith(f"{parent}.") or not parent
        for parent in parents:
            if not any(below(path, parent) for path in norms):
                raise ValueError(
                    f"where must be paths of batch norms or of what holds them, got {parent!r}; "
                    f"there are {', '.join(norms)}."
                )
        chosen = [path for path in norms if any(below(path, parent) for parent in parents)]
    for path in chosen:
        kind = type(norms[path])
        if kind is not nnx.BatchNorm and not issubclass(kind, BatchNorm):
            raise TypeError(
                f"{path or 'the model'} must be a BatchNorm of jaxnorm or Flax, got the subclass "
                f"{kind.__name__} of Flax's; make it a subclass of jaxnorm.nnx.BatchNorm."
            )
    for path in chosen:
        if type(norms[path]) is nnx.BatchNorm:
            make_ours(norms[path])
        norms[path].frozen = frozen
    return chosen
