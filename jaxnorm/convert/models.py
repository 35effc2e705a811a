"""The arrays of a whole model, by a table of names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._modules import cast_and_place_like
from jaxnorm.convert.reading import as_numpy, listed

Model = TypeVar("Model")
Place = str | tuple[str, Callable[[np.ndarray], np.ndarray]] | None

# PyTorch's weight, also of an LSTM (weight_ih_l0), or below a weight norm or a spectral norm:
# weight_v, weight_orig, and newer parametrizations.weight.original, .original0 and .original1.
_OUTPUTS_FIRST = re.compile(r"weight[^./]*(\.original[01]?)?$")
_OUTPUTS_LAST = re.compile(r"(^|[./])(kernel|w)$")  # of Flax and Keras, and of Haiku


class _Target(NamedTuple):
    """A place for an array in a model."""

    old: Any  # with a shape and a dtype
    required: bool  # whether it is an error if no array replaces it
    flipped: bool = False  # whether it is an unflipped kernel of a transposed convolution


def load(
    model: Model,
    arrays: Mapping[str, Any],
    table: Mapping[str, Place],
    *,
    keep: Iterable[str] = (),
) -> Model:
    """Load the arrays of another library's model into a model.

    Every array and every variable of the model must have a place, so that no name is forgotten.
    An array whose place is a "kernel" is transposed if it is a "weight" by the last part of its
    name: (out, in) of PyTorch's Linear becomes (in, out), and (out, in, height, width) of its
    convolutions (height, width, in, out). That includes what PyTorch keeps for a weight norm or a
    spectral norm, such as "weight_v", "weight_orig" and "parametrizations.weight.original1". The
    same is right for an `nnx.ConvTranspose` with `transpose_kernel`; without it, its kernel is
    (height, width, in, out) and flipped, which is done for nnx models. A "kernel" (of Flax
    or Keras) and a "w" (Haiku) stay as they are; any other name is an error.

    The lengths g of a weight norm, (out, 1), are the scale of a `jaxnorm.nnx.WeightNorm`, (out,):
    give a function, `("scales.kernel", np.ravel)`. PyTorch's lengths of a ConvTranspose belong to
    its inputs: the WeightNorm has `feature_axes=-2`, or -1 with `transpose_kernel`.

    Args:
      model: an nnx module, also one of `nnx.eval_shape`; or the variables of a linen model, such as
        {"params": ..., "batch_stats": ...}, also those of `jax.eval_shape`. Variables of
        linen don't include layers: give a ConvTranspose without `transpose_kernel` a function
        (below).
      arrays: tensors of PyTorch, or arrays of NumPy or JAX, by name: a `state_dict()`, or what
        `safetensors.numpy.load_file` returns.
      table: for each name its path in the model, such as "blocks.0.conv.kernel" or
        "params/conv/kernel" (dots and slashes are the same). A path and a function, as a tuple,
        is for an array that needs other care, such as a "weight" with the inputs first (Conv1D of
        GPT-2): the function takes and returns an array of NumPy, which is then not transposed. None
        leaves an array out, such as num_batches_tracked, for which Flax's batch norm has no
        variable.
      keep: paths in the model that stay as they are, each with all below it: "head".

    Returns:
      A new model; the given one is as it was. The arrays have the dtypes and shardings of the
      variables whose places they take. Of an nnx module, variables that are neither a Param nor a
      BatchStat, such as the keys of a Dropout, may be left out of the table.

    Raises:
      TypeError: model is neither, an array is none, or it is complex or floating-point where its
        place is not.
      ValueError: a name or a path is not there, left over or used twice, a shape does not fit, or
        the name of an array does not determine its layout as a kernel.

    Examples:
      >>> import numpy as np, jaxnorm.convert
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> saved = {"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)}  # PyTorch's
      >>> table = {"fc.weight": "kernel", "fc.bias": "bias"}
      >>> jaxnorm.convert.load(model, saved, table).kernel.shape
      (3, 2)
    """
    targets, rebuild = _nnx(model) if _is_nnx(model) else _linen(model)
    places, functions = {}, {}
    for name, place in table.items():
        path, functions[name] = place if isinstance(place, tuple) else (place, None)
        places[name] = None if path is None else path.replace("/", ".")
    keep = [keep] if isinstance(keep, str) else keep
    kept = tuple(path.replace("/", ".") for path in keep)
    _check_names(arrays, places, targets, kept)
    new, wrong = {}, []
    for name, path in places.items():
        if path is None:
            continue
        array, target = as_numpy(arrays[name], name), targets[path]
        value = _arranged(array, name, path, target, functions[name])
        if value.shape != tuple(target.old.shape):
            turned = "" if value.shape == array.shape else f" (arranged as {value.shape})"
            place = f"{path} of shape {tuple(target.old.shape)}"
            wrong.append(f"{name} of shape {array.shape}{turned} for {place}")
        elif not _holds(target.old.dtype, value.dtype):
            raise TypeError(
                f"{path} must be of a dtype that holds {name}, got {target.old.dtype} for "
                f"{value.dtype}; convert one of the two first."
            )
        new[path] = value
    if wrong:
        raise ValueError(
            f"arrays must have the shapes of their places in the model, got {'; '.join(wrong)}; "
            "correct the table, or give a path and a function."
        )
    return rebuild(
        {path: cast_and_place_like(targets[path].old, value) for path, value in new.items()}
    )


def _check_names(arrays, places: dict[str, str | None], targets: dict[str, _Target], kept) -> None:
    """Check that each name and path exists, and that each is used once."""
    if missing := places.keys() - arrays.keys():
        raise ValueError(
            f"table must name arrays that are there, got {listed(missing)}; there are "
            f"{listed(arrays, min(missing))}."
        )
    used = [path for path in places.values() if path is not None]
    if missing := set(used) - targets.keys():
        raise ValueError(
            f"table must hold paths of the model's variables, got {listed(missing)}; there are "
            f"{listed(targets, min(missing))}."
        )
    is_kept = lambda path: any(_is_below(path, one) for one in kept)
    if twice := {path for path in used if used.count(path) > 1 or is_kept(path)}:
        raise ValueError(
            f"each path must be used once, got {listed(twice)} more than once in table and keep; "
            "leave all but one out."
        )
    if rest := arrays.keys() - places.keys():
        raise ValueError(
            f"table must have a place for every array, got none for {listed(rest)}; add their "
            "paths, or None to leave them out."
        )
    required = {path for path, target in targets.items() if target.required and not is_kept(path)}
    if rest := required - set(used):
        raise ValueError(
            f"table must fill every variable of the model, got nothing for {listed(rest)}; add "
            "them, or pass them in keep if they are to stay as they are."
        )
    if absent := [one for one in kept if not any(_is_below(path, one) for path in targets)]:
        raise ValueError(
            f"keep must hold paths in the model, got {listed(absent)}; there are {listed(targets)}."
        )


def _is_below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _arranged(array: np.ndarray, name: str, path: str, target: _Target, function) -> np.ndarray:
    """Return an array in the layout of the model."""
    if function is not None:
        return np.asarray(function(array))
    is_kernel = path.rpartition(".")[2] == "kernel" and array.ndim > 1
    if not is_kernel or _OUTPUTS_LAST.search(name):
        return array
    if not _OUTPUTS_FIRST.search(name):
        raise ValueError(
            f"the name of an array for {path} must end in weight (outputs first, as in PyTorch) or "
            f"in kernel or w (outputs last), got {name!r}; give its path and a function, such as "
            "numpy.transpose, or one that returns the array as it is."
        )
    spatial = tuple(range(2, array.ndim))
    if target.flipped:
        return np.flip(array.transpose(*spatial, 0, 1), tuple(range(len(spatial))))
    return array.transpose(*spatial, 1, 0)


def _holds(dtype: Any, given: Any) -> bool:
    """Return whether a variable can hold values of another dtype: rounded, but of the same kind."""
    kinds = [np.bool_, np.integer, np.floating, np.complexfloating]
    rank = lambda d: next(i for i, kind in enumerate(kinds) if jnp.issubdtype(d, kind))
    return rank(given) <= rank(dtype)


def _is_nnx(model: Any) -> bool:
    from flax import nnx

    if not isinstance(model, nnx.Module | Mapping):
        raise TypeError(
            f"model must be an nnx module or the variables of a linen model, got "
            f"{type(model).__name__}; of a linen module, pass what its init returned."
        )
    return isinstance(model, nnx.Module)


def _nnx(model: Any) -> tuple[dict[str, _Target], Callable]:
    """Return the variables of an nnx module by their paths, and a function that replaces them."""
    from flax import nnx

    def variables(module: Any) -> dict[str, tuple[tuple, Any]]:
        flat = nnx.to_flat_state(nnx.state(module))
        return {_dotted(path): (path, variable) for path, variable in flat}

    modules = dict(nnx.iter_modules(model))
    targets = {}
    for name, (path, variable) in variables(model).items():
        layer = modules.get(path[:-1])
        flipped = isinstance(layer, nnx.ConvTranspose) and not layer.transpose_kernel
        required = isinstance(variable, nnx.Param | nnx.BatchStat)
        targets[name] = _Target(variable.get_value(), required, flipped)

    def rebuild(values: dict[str, jax.Array]) -> Any:
        new = nnx.clone(model)
        own = variables(model)
        flat = [(own[name][0], own[name][1].replace(value)) for name, value in values.items()]
        nnx.update(new, nnx.from_flat_state(flat))
        return new

    return targets, rebuild


def _dotted(path: Any) -> str:
    """Join a path whose parts may be paths, such as ("scales", ("kernel",)) of a weight norm."""
    return ".".join(map(_dotted, path)) if isinstance(path, tuple) else str(path)


def _linen(variables: Any) -> tuple[dict[str, _Target], Callable]:
    """Return the variables of linen by their paths, and a function that replaces them."""
    from flax.core import meta

    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)
    flat, structure = jax.tree.flatten_with_path(variables, is_leaf=is_box)
    dotted = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")
    leaves = {dotted(path): leaf for path, leaf in flat}
    targets = {name: _Target(meta.unbox(leaf), required=True) for name, leaf in leaves.items()}

    def rebuild(values: dict[str, jax.Array]) -> Any:
        new = [
            leaf
            if name not in values
            else leaf.replace_boxed(values[name])
            if is_box(leaf)
            else values[name]
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(structure, new)

    return targets, rebuild
