"""Helpers that `jaxnorm.linen` and `jaxnorm.nnx` share, and `jaxnorm.convert` in part."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxnorm.core.arguments import check_dtype, check_number, check_param
from jaxnorm.core.arithmetic import is_small_float, promote, real_dtype
from jaxnorm.core.axes import Axes
from jaxnorm.core.devices import LOCAL, bound_devices
from jaxnorm.core.layout import Layout
from jaxnorm.core.layouts import batch_layout
from jaxnorm.core.moments import Moments
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.spectral import init_vectors, spectral_normalize
from jaxnorm.functional.state import BatchNormState, update_batch_norm_state
from jaxnorm.functional.weight import weight_norm


def replacements(flax: Any, ours: Any) -> dict[type, type]:
    """Map the norms of Flax, which are in the module `flax`, to the classes of the same names."""
    names = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
    return {getattr(flax, name): getattr(ours, name) for name in names}


def options_of(module: Any, mask: jax.Array | None, *, bind_names: bool) -> dict[str, Any]:
    """Return the options of `prepare_call` that are attributes of a module, and its mask.

    Without `bind_names`, the statistics are those of this device, and nothing has to bind the
    module's axis name.
    """
    devices = LOCAL
    if bind_names and module.axis_name is not None:
        devices = bound_devices(module.axis_name, module.axis_index_groups)
    return {
        "epsilon": module.epsilon,
        "scale_offset": module.scale_offset,
        "where": None if mask is None else jnp.asarray(mask, bool),
        "devices": devices,
    }


def add_params(
    learned: NormParams, given: NormParams, layout: Layout, dtype: jnp.dtype
) -> NormParams:
    """Add two scales and two biases, in float32 or better; None counts as zero."""

    def add(name, a, b):
        if b is None:
            return a
        b = check_param(b, name, layout, dtype)
        if a is None:
            return b
        wide = promote(a.dtype, b.dtype, jnp.float32)
        return layout.broadcast(a).astype(wide) + layout.broadcast(b).astype(wide)

    return NormParams(*map(add, NormParams._fields, learned, given))


def initial_scale(offset: float) -> float:
    """Return the scale that, with its offset, is the factor one."""
    return 1.0 - check_number(offset, "scale_offset")


def update_running_statistics(
    mean: jax.Array, var: jax.Array, moments: Moments, momentum: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Return the running statistics of a module, updated by the moments.

    Like Flax's, they have no count of updates, and may be in half precision. Then they are promoted
    to `dtype`, that of the input.
    """
    if momentum is None:
        raise ValueError(
            "momentum must lie in [0, 1], got None; the cumulative average needs a count of "
            "updates, which Flax's variables don't have: use jaxnorm.batch_norm for it."
        )
    wide_mean, wide_var = (a.astype(promote(a.dtype, jnp.float32)) for a in (mean, var))
    state = BatchNormState(wide_mean, wide_var, jnp.zeros((), jnp.int32))
    state = update_batch_norm_state(state, moments, momentum=momentum)
    dtype = dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
    return (
        state.mean.astype(promote(mean.dtype, dtype)),
        state.var.astype(promote(var.dtype, real_dtype(dtype))),
    )


def cast_and_place_like(old: Any, value: np.ndarray | jax.Array) -> jax.Array:
    """Cast a value to the dtype of an array, and place it on the same devices."""
    new = jnp.asarray(value.astype(old.dtype))
    if isinstance(old, jax.Array) and not isinstance(old, Tracer) and old.committed:
        return jax.device_put(new, old.sharding)
    return new


def widened(x: Any, dtype: DTypeLike | None) -> jax.Array:
    """Return x as an array that JAX promotes; if a module has a dtype, cast float8 to float32."""
    x = jnp.asarray(x)
    if dtype is None:
        check_dtype(x.dtype, "x", "convert it first, or give the module a dtype.")
        return x
    check_dtype(jnp.dtype(dtype), "dtype", "convert the result afterwards.")
    return x.astype(jnp.float32) if is_small_float(x.dtype) else x


def warn_of_single_elements(layout: Layout) -> None:
    """Warn if no axis is left to measure over; Flax returns the same without a warning."""
    if not layout.reduction_axes:
        warnings.warn(
            "InstanceNorm must have an axis besides those of the examples and the features, got "
            f"x of shape {layout.shape}; the result is the bias whatever x is, so use LayerNorm "
            "for statistics over the features.",
            stacklevel=3,
        )


def call_in_dtype(
    function: Callable, x: Any, dtype: DTypeLike, *args: Any, **options: Any
) -> jax.Array:
    """Call `function(x, ...)` in at least `dtype`, and cast its result to `dtype`."""
    x = widened(x, dtype)
    return function(x.astype(promote(x.dtype, dtype)), *args, **options).astype(dtype)


def weight_normalized(
    weights: jax.Array,
    scale: jax.Array | None,
    feature_axes: Axes,
    epsilon: float,
    dtype: DTypeLike,
) -> jax.Array:
    """Apply `weight_norm` with the scale as g; without a scale, g is one."""
    wide = weights.astype(promote(weights.dtype, dtype))
    if scale is None:
        layout = batch_layout(weights.shape, feature_axes, name="feature_axes")
        scale = jnp.ones(layout.feature_shape, real_dtype(wide.dtype))
    return weight_norm(wide, scale, feature_axis=feature_axes, epsilon=epsilon).astype(dtype)


def spectrally_normalized(
    weights: jax.Array, u: jax.Array, steps: int, epsilon: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the weights divided by sigma after `steps` power iterations, the new u, and sigma.

    Flax stores u and sigma. v is not stored; without a step it is computed from u.
    """
    wide = weights.astype(promote(weights.dtype, dtype))
    layout = batch_layout(wide.shape, -1)
    y, state, sigma = spectral_normalize(
        layout, steps, epsilon, wide, init_vectors(layout, wide, u.reshape(-1))
    )
    return y.astype(dtype), state.u.reshape(u.shape).astype(u.dtype), sigma


def check_matrix(required: bool, name: str, shape: tuple[int, ...]) -> None:
    """Check that weights are a matrix, if that is required."""
    if required and len(shape) > 2:
        raise ValueError(
            f"{name} must be a matrix where error_on_non_matrix is True, got shape {shape}; set it "
            "to False, and all axes but the last become the rows of a matrix."
        )


def check_no_mask(mask: jax.Array | None) -> None:
    """Check that there is no mask of weights: masked weights would count in the statistics."""
    if mask is not None:
        raise ValueError(
            f"mask must be None where weights are standardized, got an array of shape {mask.shape};"
            " use Flax's Conv for a masked convolution."
        )
