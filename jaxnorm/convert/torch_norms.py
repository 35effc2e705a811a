"""PyTorch's norms: parameters, running statistics and options."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnorm.convert.reading import (
    as_numpy,
    as_scale_or_bias,
    as_statistic,
    is_native,
    kind_of,
    listed,
)
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.state import BatchNormState

_STATISTICS = "running_mean", "running_var"
_COUNT = "num_batches_tracked"
_NAMES = {"weight", "bias", *_STATISTICS, _COUNT}
_KINDS = "_BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "_InstanceNorm"


def from_torch(
    state_dict: Mapping[str, Any], prefix: str = ""
) -> tuple[NormParams, BatchNormState | None]:
    """Read scale, bias and running statistics of a PyTorch norm.

    `torch_options` has the options that go with them.

    Args:
      state_dict: what `module.state_dict()` returns, or the same names with arrays of NumPy or
        JAX, such as `safetensors.numpy.load_file` returns. Tensors may be on any device and of any
        dtype that JAX has.
      prefix: the path of the norm, such as "layer1.0.bn1", with or without a dot at the end.

    Returns:
      The parameters, in their own dtype (float64 is float32 unless JAX has 64 bits), with None for
      what the norm lacks (for both, of a norm without arrays, whose state dict is empty); and the
      state in float32 or better, or None without running statistics.
      Its count is num_batches_tracked, or 0 where there is none, as before PyTorch 0.4.1.

    Raises:
      TypeError: an array is not one of these.
      ValueError: there is no norm of that prefix, or its arrays are not those of a norm. A weight
        of several axes by itself may be that of a Linear or an Embedding, and is refused.

    Examples:
      >>> import numpy as np, jaxnorm.convert
      >>> saved = {"bn.weight": np.ones(2), "bn.running_mean": np.zeros(2)}
      >>> saved |= {"bn.running_var": np.ones(2), "bn.num_batches_tracked": np.array(3)}
      >>> params, state = jaxnorm.convert.from_torch(saved, "bn")
      >>> params.bias is None, int(state.count)
      (True, 3)
    """
    if not isinstance(state_dict, Mapping) or not isinstance(prefix, str):
        raise TypeError(
            "state_dict must be a dictionary of arrays and prefix a string, got "
            f"{type(state_dict).__name__} and {type(prefix).__name__}; pass module.state_dict()."
        )
    if not state_dict and not prefix:
        return NormParams(), None
    start = f"{prefix.removesuffix('.')}." if prefix else ""
    below = {
        name.removeprefix(start): value
        for name, value in state_dict.items()
        if name.startswith(start)
    }
    found = {name: value for name, value in below.items() if "." not in name}
    if not found:
        norms = {
            parent for parent, _, name in (n.rpartition(".") for n in state_dict) if name in _NAMES
        }
        raise ValueError(
            f"prefix must be that of a norm in state_dict, got {prefix!r}; the prefixes there are "
            f"{listed(norms, prefix)}; a norm without arrays has none, so take NormParams() for it."
        )
    if below.keys() - _NAMES or (_STATISTICS[0] in found) != (_STATISTICS[1] in found):
        raise ValueError(
            f"prefix must be that of a norm, with running_mean and running_var or neither, got "
            f"{prefix!r} with {listed(below)}; pass the prefix of the norm itself."
        )
    shapes = {np.shape(value) for name, value in found.items() if name != _COUNT}
    if len(shapes) > 1:
        raise ValueError(
            f"the arrays of a norm must have one shape, got {sorted(map(tuple, shapes))} at "
            f"{prefix!r}; pass the prefix of the norm itself."
        )
    if found.keys() == {"weight"} and np.ndim(found["weight"]) > 1:
        raise ValueError(
            "a weight of several axes must come with a bias of its shape, got one of shape "
            f"{tuple(np.shape(found['weight']))} by itself at {prefix!r}, which may be that of a "
            "Linear or an Embedding; if it is a norm's, pass NormParams(weight) to the norm."
        )
    params = NormParams(
        *(as_scale_or_bias(found.get(name), start + name) for name in ("weight", "bias"))
    )
    if _STATISTICS[0] not in found:
        return params, None
    mean, var = (as_statistic(found[name], start + name) for name in _STATISTICS)
    count = int(as_numpy(found.get(_COUNT, 0), start + _COUNT))
    return params, BatchNormState(mean, var, jnp.asarray(count, jnp.int32))


def to_torch(
    params: NormParams | None, state: BatchNormState | None = None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Return the state dictionary of a PyTorch norm.

    Args:
      params: scale and bias; what is None is left out, as it is by a module without it.
      state: the running statistics, of a module that tracks them, or None.
      prefix: the path of the norm, with or without a dot at the end.

    Returns:
      Arrays of NumPy for `load_state_dict(..., strict=True)`, after `torch.from_numpy`. They are
      copies, which PyTorch may write to. What NumPy has no dtype for, such as bfloat16, is
      float32: `load_state_dict` converts it back, and no digit is lost.

    Raises:
      TypeError: params is not a NormParams, or state not a BatchNormState.

    Examples:
      >>> import jaxnorm as jn, jaxnorm.convert
      >>> saved = jn.convert.to_torch(jn.init_params(2), jn.init_batch_norm_state(2), "bn")
      >>> list(saved)
      ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    """
    if not isinstance(params, NormParams | None) or not isinstance(state, BatchNormState | None):
        raise TypeError(
            "params must be a NormParams or None, and state a BatchNormState or None, got "
            f"{type(params).__name__} and {type(state).__name__}; write for example "
            "to_torch(jaxnorm.NormParams(scale, bias))."
        )
    start = f"{prefix.removesuffix('.')}." if prefix else ""
    values: dict[str, Any] = {}
    if params is not None:
        values |= {"weight": params.scale, "bias": params.bias}
    if state is not None:
        values |= {"running_mean": state.mean, "running_var": state.var}
    arrays = {start + name: np.array(value) for name, value in values.items() if value is not None}
    for name, array in arrays.items():
        arrays[name] = array if is_native(array.dtype) else array.astype(np.float32)
    if state is not None:
        arrays[start + _COUNT] = np.array(state.count, np.int64)
    return arrays


def torch_options(module: Any) -> dict[str, Any]:
    """Return the keywords that make a function of jaxnorm compute the same as a PyTorch norm.

    With them, `batch_norm`, `layer_norm`, `rms_norm`, `group_norm` or `instance_norm` gives the
    same result for the same x, and `batch_norm` the same running statistics after each step: the
    momentum is 1 - m, or None where PyTorch's is, and ddof is 1. The features are axis 1, as in
    PyTorch; for x with features last, replace it: `torch_options(module) | {"feature_axis": -1}`.

    Running statistics of an instance norm are averages over the examples. In training they move by
    `update_batch_norm_state`, and in evaluation the norm is `batch_norm(..., train=False)`:

        own = jn.moments(x, (2, 3))
        moments = jn.Moments(own.mean.mean(0), own.var.mean(0), own.count[0])
        state = jn.update_batch_norm_state(state, moments, momentum=1 - module.momentum, ddof=1)

    Args:
      module: a BatchNorm (also SyncBatchNorm; the axis_name is yours to give), LayerNorm, RMSNorm,
        GroupNorm or InstanceNorm of `torch.nn`.

    Returns:
      A dictionary of keywords. RMSNorm without an eps has that of PyTorch: the machine epsilon of
      float32, or of float64 for float64.

    Raises:
      TypeError: the module is none of these, or a subclass with a `forward` of its own.
    """
    kind = kind_of(module, _KINDS, "torch.nn.modules.", "forward")
    epsilon = module.eps
    match kind:
        case "_BatchNorm":
            momentum = None if module.momentum is None else 1 - module.momentum
            return {"momentum": momentum, "ddof": 1, "epsilon": epsilon, "feature_axis": 1}
        case "GroupNorm":
            return {"num_groups": module.num_groups, "epsilon": epsilon, "feature_axis": 1}
        case "_InstanceNorm":
            return {"epsilon": epsilon, "feature_axis": 1}
    if epsilon is None:
        wide = "float64" in str(getattr(module.weight, "dtype", ""))
        epsilon = float(np.finfo(np.float64 if wide else np.float32).eps)
    return {"axis": tuple(range(-len(module.normalized_shape), 0)), "epsilon": epsilon}
