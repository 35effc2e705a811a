"""Arrays and objects of other libraries, read without importing these."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

MANY = 20  # names in a message


def as_numpy(value: Any, name: str) -> np.ndarray:
    """Copy a PyTorch tensor, or a NumPy or JAX array, to NumPy.

    NumPy has bfloat16 and the like by the package ml_dtypes, which JAX requires. A tensor of such
    a dtype goes through float32, which holds all of them.
    """
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        try:
            dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        except TypeError:
            raise TypeError(
                f"{name} must be of a dtype that JAX has, got {tensor.dtype}; convert the tensor "
                "first, for example with .float()."
            ) from None
        tensor = tensor if is_native(dtype) else tensor.float()
        return np.array(tensor.numpy(force=True)).astype(dtype, copy=False)
    array = np.array(value)
    if not jnp.issubdtype(array.dtype, np.number) and array.dtype != bool:
        raise TypeError(
            f"{name} must be an array of numbers, got {type(value).__name__}; pass tensors of "
            "PyTorch, or arrays of NumPy or JAX."
        )
    return array


def is_native(dtype: np.dtype) -> bool:
    """Return whether the dtype is one of NumPy's own."""
    return np.dtype(dtype).kind != "V" and np.dtype(dtype).isbuiltin == 1


def as_scale_or_bias(value: Any, name: str) -> Any:
    """Return a parameter as a JAX array of its own dtype; None stays None."""
    return None if value is None else jnp.asarray(as_numpy(value, name))


def as_statistic(value: Any, name: str) -> Any:
    """Return a running statistic as a JAX array of float32 or better."""
    array = as_numpy(value, name)
    wide = array.dtype.itemsize >= 4 and jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.asarray(array if wide else array.astype(np.float32))


def listed(names: Iterable[str], like: str = "") -> str:
    """List names for a message: all, or the most similar to another name."""
    names = sorted(set(names))
    if not names:
        return "none"
    shown = names
    if len(names) > MANY:
        shown = difflib.get_close_matches(like, names, MANY, cutoff=0.0) if like else names[:MANY]
    rest = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + rest


def kind_of(instance: Any, kinds: Iterable[str], root: str, method: str) -> str:
    """Return which of the classes `kinds` an object of another library is.

    `root` is where the library defines them, and `method` what computes. A subclass with a method
    of its own may compute something else.
    """
    classes = [cls for cls in type(instance).__mro__ if cls.__module__.startswith(root)]
    names = {cls.__name__ for cls in classes}
    found = next((kind for kind in kinds if kind in names), None)
    if found is None:
        raise TypeError(
            f"the norm must be one of {', '.join(kind.strip('_') for kind in kinds)}, got "
            f"{type(instance).__name__}; find out what it computes, and with which options."
        )
    if getattr(type(instance), method) is not getattr(classes[0], method):
        raise TypeError(
            f"the norm must compute what {classes[0].__name__} does, got "
            f"{type(instance).__name__}, whose {method} is its own; find out what that does, and "
            "with which options."
        )
    return found
