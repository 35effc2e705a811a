"""Batch norms folded into the layers before them, in whole nnx models."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxnorm.core.arithmetic import promote
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.fold import fold_batch_norm
from jaxnorm.functional.state import BatchNormState
from jaxnorm.nnx.norms import BatchNorm

Model = TypeVar("Model", bound=nnx.Module)
Path = tuple[Any, ...]

_LAYERS = nnx.Linear, nnx.Conv, nnx.ConvTranspose
_NORMS = nnx.BatchNorm, BatchNorm


class FoldedNorm(nnx.Module):
    """A folded norm: it returns x in the dtype of the norm's result."""

    def __init__(self, dtype: DTypeLike | None, promoted: DTypeLike):
        """Store the norm's dtype, and the dtype of its variables, with which x is promoted."""
        self.dtype = dtype
        self.promoted = promoted

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """Return x."""
        if use_running_average is False:
            raise ValueError(
                "use_running_average must be True where the norm is folded into the layer before "
                "it, got False; train the model as it was before jaxnorm.nnx.fold."
            )
        return x.astype(self.dtype or promote(x.dtype, self.promoted))


def fold(
    model: Model,
    *inputs: Any,
    pairs: Iterable[tuple[str, str]] | None = None,
    tolerance: float | None = None,
) -> Model:
    """Fold batch norms into the layers before them; return a model for evaluation.

    Each pair is a Linear, Conv or ConvTranspose and the batch norm after it, of Flax or of
    jaxnorm. The layer's new kernel and bias include the norm, and a module that returns its input
    replaces the norm. The given model does not change.

    Both models are called on `inputs` in evaluation, and their outputs must agree. This check finds
    a wrong pair, another operation between layer and norm, and a layer or norm that is used twice.

    Args:
      model: any nnx module.
      *inputs: arguments for the calls that are compared; use typical data.
      pairs: paths of a layer and of the norm after it, such as ("blocks.0.conv", "blocks.0.bn").
        None: all neighbours in an `nnx.Sequential`, wherever in the model it is.
      tolerance: how much outputs may differ, as a fraction of the largest; by default the square
        root of the machine epsilon, that is half of the digits, of the smallest dtype among
        outputs and folded kernels. Products are computed in the highest precision.

    Returns:
      A new model of the same class, after `eval()`, with the same other variables' values.

    Raises:
      TypeError: the model is not an nnx module, or a pair is not of such classes. A subclass with
        a `__call__` of its own is none of them.
      ValueError: there are no inputs, no pairs or no such paths, a norm's axis is not the layer's
        outputs, or the models differ.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jn.BatchNorm(4, rngs=rngs), nnx.relu)
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> y = model(x)  # a step of training, say
      >>> folded = jn.fold(model, x)
      >>> type(folded.layers[1]).__name__
      'FoldedNorm'

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, arXiv:1712.05877.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model must be an nnx module, got {type(model).__name__}; for variables of Flax "
            "linen, call jaxnorm.fold_batch_norm on the arrays of each layer."
        )
    if not inputs:
        raise ValueError(
            "inputs must be given, got none; pass what the model is called on, so that the folded "
            "model can be compared with it."
        )
    reference = nnx.clone(model)
    reference.eval()
    folded = nnx.clone(reference)
    modules = {path: node for path, node in nnx.iter_graph(folded) if not _is_variable(node)}
    found = _neighbours(modules) if pairs is None else _named(modules, pairs)
    kernels = [_fold_pair(modules, *pair) for pair in found]
    if not kernels:
        raise ValueError(
            "model must have a batch norm to fold, got none that follows a Linear, Conv or "
            "ConvTranspose in an nnx.Sequential; name the layers and norms in pairs."
        )
    # A call may change variables of a model, such as a cache, so return a model that was not
    # called.
    _check_same(reference, nnx.clone(folded), inputs, tolerance, kernels)
    return folded


def _neighbours(modules: dict[Path, Any]) -> Iterator[tuple[Path, Path]]:
    """Find layers and norms that follow each other in a Sequential; return their paths."""
    for path, module in list(modules.items()):
        if not _is_exactly(module, nnx.Sequential):
            continue
        for index, (layer, norm) in enumerate(
            zip(module.layers[:-1], module.layers[1:], strict=True)
        ):
            if _is_exactly(layer, *_LAYERS) and _is_exactly(norm, *_NORMS):
                places = ((*path, "layers", index), (*path, "layers", index + 1))
                if _fits(layer, norm) and all(place in modules for place in places):
                    yield places


def _named(
    modules: dict[Path, Any], pairs: Iterable[tuple[str, str]]
) -> Iterator[tuple[Path, Path]]:
    """Check the given paths, and return them."""
    by_name = {".".join(map(str, path)): path for path in modules}
    named: list[str] = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"pairs must hold two paths each, a layer's and a norm's, got {pair!r}; write for "
                "example pairs=[('conv', 'norm')]."
            )
        paths = []
        for name, kinds in zip(pair, (_LAYERS, _NORMS), strict=True):
            if name not in by_name:
                fit = [key for key, path in by_name.items() if _is_exactly(modules[path], *kinds)]
                raise ValueError(
                    f"pairs must hold paths of modules, got {name!r}; there are "
                    f"{', '.join(fit) or 'none'}."
                )
            module = modules[by_name[name]]
            if not _is_exactly(module, *kinds):
                raise TypeError(
                    f"{name} must be {' or '.join(kind.__name__ for kind in kinds[:3])} with "
                    f"their own __call__, got {type(module).__name__}; fold it by "
                    "jaxnorm.fold_batch_norm if that is right."
                )
            paths.append(by_name[name])
        if twice := [name for name in pair if name in named]:
            raise ValueError(
                f"pairs must name each layer and norm once, got {twice[0]!r} twice; leave one out."
            )
        named += pair
        layer, norm = (modules[path] for path in paths)
        if not _fits(layer, norm):
            raise ValueError(
                f"{pair[1]} must normalize the outputs of {pair[0]}, which are the last axis, got "
                f"axis={norm.axis}; leave this pair out."
            )
        yield paths[0], paths[1]


def _fold_pair(modules: dict[Path, Any], layer_path: Path, norm_path: Path) -> DTypeLike:
    """Change a layer and replace a norm; return the dtype of the kernel."""
    layer, norm = modules[layer_path], modules[norm_path]
    value = lambda variable: None if variable is None else variable[...]
    kernel, bias = fold_batch_norm(
        layer.kernel[...],
        value(layer.bias),
        BatchNormState(norm.mean[...], norm.var[...], jnp.zeros((), jnp.int32)),
        NormParams(value(norm.scale), value(norm.bias)),
        epsilon=norm.epsilon,
        scale_offset=getattr(norm, "scale_offset", 0.0),
        output_axis=-2 if getattr(layer, "transpose_kernel", False) else -1,
    )
    layer.kernel[...] = kernel
    if layer.bias is None:
        layer.bias, layer.use_bias = nnx.Param(bias), True
    else:
        layer.bias[...] = bias
    owned = [norm.mean, norm.var, norm.scale, norm.bias]
    promoted = promote(*(variable.dtype for variable in owned if variable is not None))
    parent: Any = modules[norm_path[:-1]]
    name = norm_path[-1]
    left = FoldedNorm(norm.dtype, promoted)
    if isinstance(name, int) or not isinstance(parent, nnx.Module):
        parent[name] = left  # a list or a dictionary
    else:
        setattr(parent, name, left)
    return kernel.dtype


def _check_same(reference, folded, inputs, tolerance: float | None, dtypes: list) -> None:
    """Raise an error if two models differ in their outputs."""
    with jax.default_matmul_precision("highest"):
        outputs = [jax.tree.leaves(model(*inputs)) for model in (reference, folded)]
    for old, new in zip(*outputs, strict=True):
        old, new = jnp.asarray(old), jnp.asarray(new)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                "the folded model must give outputs of the same shape and dtype, got "
                f"{new.shape} {new.dtype} instead of {old.shape} {old.dtype}; leave the last pair "
                "out."
            )
        floating = jnp.issubdtype(old.dtype, jnp.inexact)
        among = [*dtypes, old.dtype] if floating else dtypes
        limit = max(float(jnp.finfo(dtype).eps) ** 0.5 for dtype in among)
        limit = limit if tolerance is None else tolerance
        kind = np.complex128 if jnp.iscomplexobj(old) else np.float64
        old, new = np.asarray(old).astype(kind), np.asarray(new).astype(kind)
        difference = float(np.abs(new - old).max(initial=0))
        size = float(np.abs(old).max(initial=0))
        if not difference <= limit * size:  # nor is NaN
            raise ValueError(
                "the folded model must give the outputs of the model, got a difference of "
                f"{difference:.3g} where the largest output is {size:.3g} and the tolerance "
                f"{limit:.3g} of it; check that each norm follows its layer directly, and that "
                "neither is used twice."
            )


def _fits(layer: Any, norm: Any) -> bool:
    """Return whether the norm's axis is the layer's axis of outputs."""
    last = [-1, (-1,), [-1]]
    if not isinstance(layer, nnx.Linear):  # the rank of its outputs is known
        last.append(len(layer.kernel_size) + 1)
    return norm.axis in last and norm.mean.shape == (layer.out_features,)


def _is_exactly(module: Any, *kinds: type) -> bool:
    """Return whether the `__call__` of a module is that of one of these classes."""
    return any(
        isinstance(module, kind) and type(module).__call__ is kind.__call__ for kind in kinds
    )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
