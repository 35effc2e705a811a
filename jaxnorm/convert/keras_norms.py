"""Keras's norms: parameters, running statistics and options."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.convert.reading import as_scale_or_bias, as_statistic, kind_of
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.state import BatchNormState

_KINDS = "BatchNormalization", "LayerNormalization", "RMSNormalization", "GroupNormalization"


def from_keras(layer: Any) -> tuple[NormParams, BatchNormState | None]:
    """Read scale, bias and running statistics of a Keras layer, on any of its backends.

    `keras_options` has the options that go with them.

    Args:
      layer: a BatchNormalization, LayerNormalization, RMSNormalization or GroupNormalization that
        is built.

    Returns:
      The parameters, in their own dtype, with None for what the layer lacks; and for batch norm
      the state in float32 or better, else None. Keras counts no updates: the count is 0, which
      matters only for `momentum=None`.

    Raises:
      TypeError: the layer is none of these, or a subclass with a `call` of its own.
      ValueError: it is not built, or computes what no function of jaxnorm does.
    """
    kind = _checked(layer)
    names = ("scale",) if kind == "RMSNormalization" else ("gamma", "beta")
    params = NormParams(*(as_scale_or_bias(_value(getattr(layer, name)), name) for name in names))
    if isinstance(layer.axis, list | tuple):
        params = _in_order(params, layer)
    if kind != "BatchNormalization":
        return params, None
    mean, var = (
        as_statistic(_value(getattr(layer, name)), name)
        for name in ("moving_mean", "moving_variance")
    )
    return params, BatchNormState(mean, var, jnp.zeros((), jnp.int32))


def keras_options(layer: Any) -> dict[str, Any]:
    """Return the keywords that make a function of jaxnorm compute the same as a Keras layer.

    With them, `batch_norm`, `layer_norm`, `rms_norm` or `group_norm` gives the same result for the
    same x, and `batch_norm` the same running statistics after each step. Keras's momentum is ours.
    A layer that is not `trainable` is a call with `train=False`.

    Args:
      layer: as in `from_keras`.

    Returns:
      A dictionary of keywords.

    Raises:
      TypeError: the layer is none of these, or a subclass with a `call` of its own.
      ValueError: it is not built, or computes what no function of jaxnorm does.
    """
    kind = _checked(layer)
    options = {"epsilon": float(layer.epsilon)}
    match kind:
        case "BatchNormalization":
            return options | {"momentum": layer.momentum, "ddof": 0, "feature_axis": layer.axis}
        case "GroupNormalization":
            return options | {"num_groups": int(layer.groups), "feature_axis": layer.axis}
    axis = layer.axis
    return options | {"axis": tuple(axis) if isinstance(axis, list | tuple) else axis}


def _checked(layer: Any) -> str:
    kind = kind_of(layer, _KINDS, "keras.src.layers.normalization.", "call")
    if not layer.built:
        raise ValueError(
            f"the layer must be built, got {layer.name!r}, which has no arrays yet; call it once, "
            "or layer.build(shape)."
        )
    for option, instead in (
        ("renorm", "jaxnorm.Renorm averages variances where Keras averages standard deviations"),
        ("rms_scaling", "it divides by the variance and is deprecated"),
    ):
        if getattr(layer, option, False):
            raise ValueError(
                f"{option} must be False in a layer that is converted, got {layer.name!r} with "
                f"it; {instead}, so convert its arrays by hand."
            )
    return kind


def _in_order(params: NormParams, layer: Any) -> NormParams:
    """Transpose scale and bias to the order of the axes of x.

    Keras sorts axes as they are given, so [1, -2] becomes [-2, 1], and makes the arrays in this
    order. But it reshapes them to the order of x, and does not transpose them.
    """
    rank = len(layer.get_build_config()["input_shape"])
    order = np.argsort([axis % rank for axis in layer.axis])
    return jax.tree.map(lambda a: a.reshape([a.shape[i] for i in order]), params)


def _value(variable: Any) -> Any:
    """Return the array of a variable of JAX, PyTorch or TensorFlow; None stays None."""
    return None if variable is None else variable.value
