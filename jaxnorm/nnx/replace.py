"""Replacement of Flax's norms by jaxnorm's in nnx models."""

import warnings
from typing import Any, TypeVar

from flax import nnx

from jaxnorm._modules import replacements
from jaxnorm.nnx import norms

Model = TypeVar("Model", bound=nnx.Module)
_OURS = replacements(nnx, norms)


def replace(model: Model) -> Model:
    """Replace the norms of Flax in a model by those of `jaxnorm.nnx`, in place; return the model.

    Modules keep their variables, arguments, modes, and places in the model, so optimizers and
    checkpoints still fit. Nothing else is touched. A subclass of Flax's norm may compute something
    else: it stays, and a warning lists the path and class of each.

    Args:
      model: any nnx module.

    Raises:
      TypeError: the model is not an nnx module.

    Examples:
      >>> import jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs))
      >>> type(jn.replace(model).layers[1])
      <class 'jaxnorm.nnx.norms.LayerNorm'>
    """
    stay = []
    for path, module in modules_of(model).items():
        if type(module) in _OURS:
            make_ours(module)
        elif isinstance(module, tuple(_OURS)) and not isinstance(module, tuple(_OURS.values())):
            stay.append(f"{path or 'the model'} ({type(module).__name__})")
    if stay:
        warnings.warn(
            f"subclasses of Flax's norms stay as they are: {', '.join(stay)}; make them subclasses "
            "of jaxnorm.nnx's.",
            stacklevel=2,
        )
    return model


def make_ours(module: Any) -> None:
    """Change the class of a norm of Flax to ours; keep the object, its variables and arguments."""
    # References to the module stay valid. Our classes add only attributes with defaults.
    object.__setattr__(module, "__class__", _OURS[type(module)])
    module.scale_offset = 0.0
    if isinstance(module, norms.BatchNorm):
        module.virtual_batch_size = module.renorm = None


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """Return all modules by their paths, such as "blocks.0.norm"; that of the model is ""."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx module, got {type(model).__name__}; of a linen model, use "
            "jaxnorm.linen."
        )
    return {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
