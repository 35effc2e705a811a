"""What `jaxnorm.linen` and `jaxnorm.nnx` share: arguments of a norm by a module's attributes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnorm.core.arithmetic import promote, real_dtype
from jaxnorm.core.devices import LOCAL, bound_devices
from jaxnorm.core.layout import Layout
from jaxnorm.core.moments import Moments
from jaxnorm.core.normalize import Arrays, checked
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.state import BatchNormState, update_batch_norm_state


def checked_call(
    name: str,
    module: Any,
    layout: Layout,
    prepared: tuple[jax.Array, NormParams, DTypeLike],
    mask: jax.Array | None,
    *,
    residual: jax.Array | None = None,
    subtract_mean: bool = True,
    bind_names: bool = True,
    implementation: str | None = None,
) -> tuple[NormSpec, Arrays]:
    """What `normalize` takes, by a module's attributes.

    `prepared` holds x, the parameters and the result's dtype; a residual is cast to the dtype of
    this x. Without `bind_names`, the statistics are those of this device, and nothing has to bind
    the module's axis name.
    """
    x, params, dtype = prepared
    devices = LOCAL
    if bind_names and module.axis_name is not None:
        devices = bound_devices(module.axis_name, module.axis_index_groups)
    return checked(
        name,
        x,
        layout,
        params,
        epsilon=module.epsilon,
        scale_offset=module.scale_offset,
        where=None if mask is None else jnp.asarray(mask, bool),
        residual=None if residual is None else residual.astype(x.dtype),
        subtract_mean=subtract_mean,
        devices=devices,
        dtype=dtype,
        implementation=implementation,
    )


def initial_scale(offset: float) -> float:
    """The scale that, with its offset, changes nothing."""
    return 1.0 - offset


def update_running_statistics(
    mean: jax.Array, var: jax.Array, moments: Moments, momentum: float, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """The running statistics of a module, moved towards the moments.

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


def called(function: Callable, x: Any, dtype: DTypeLike, *args: Any, **options: Any) -> jax.Array:
    """`function(x, ...)` with a result of `dtype`: x is cast up before, and y down after."""
    x = jnp.asarray(x)
    return function(x.astype(promote(x.dtype, dtype)), *args, **options).astype(dtype)
