"""The call of a linen norm: its attributes, parameters and arguments, checked for `core`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import add_params, initial_scale, options_of, widened
from jaxnorm.core.layout import Layout
from jaxnorm.core.norm import Arrays, prepare_call
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams


def prepare_module_call(
    name: str,
    module: Any,
    x: Any,
    layout: Layout,
    mask: jax.Array | None,
    given: NormParams,
    *,
    residual: jax.Array | None = None,
    moments: tuple[jax.Array, jax.Array] | None = None,
    **options: Any,
) -> tuple[NormSpec, Arrays]:
    """Check a module's call: with its attributes and its parameters, which are created if needed.

    x becomes floating-point or complex, the residual gets its dtype, and the parameters that are
    `given` with the call are added to the learned ones. With `moments`, statistics are not
    measured.
    """
    x, shape, dtype = widened(x, module.dtype), layout.feature_shape, module.param_dtype
    scale = bias = None
    if module.use_scale:
        init = module.scale_init
        if init is nn.initializers.ones:  # Flax's default
            init = nn.initializers.constant(initial_scale(module.scale_offset))
        scale = module.param("scale", init, shape, dtype)
    if getattr(module, "use_bias", False):  # RMSNorm has none
        bias = module.param("bias", module.bias_init, shape, dtype)
    with jax.numpy_dtype_promotion("standard"):
        dtype = canonicalize_dtype(x, scale, bias, *given, dtype=module.dtype)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(dtype)
    return prepare_call(
        name,
        x,
        layout,
        add_params(NormParams(scale, bias), given, layout, jnp.dtype(dtype)),
        residual=None if residual is None else residual.astype(x.dtype),
        moments=moments,
        dtype=dtype,
        **options_of(module, mask, bind_names=moments is None and not module.is_initializing()),
        **options,
    )
