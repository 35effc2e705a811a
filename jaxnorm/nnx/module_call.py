"""The call of an nnx norm: its attributes, parameters and arguments, checked for `core`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import add_params, options_of, widened
from jaxnorm.core.arithmetic import promote
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
    running: tuple[jax.Array, ...] = (),
    residual: jax.Array | None = None,
    moments: tuple[jax.Array, jax.Array] | None = None,
    **options: Any,
) -> tuple[NormSpec, Arrays]:
    """Check a module's call, with its attributes and its parameters.

    x, `running` statistics and parameters are passed to `promote_dtype`, as Flax does. The residual
    gets the dtype of x, and the parameters that are `given` with the call are added to the learned
    ones. With `moments`, statistics are not measured.
    """
    x = widened(x, module.dtype)
    owned = [module.scale, module.bias] if hasattr(module, "use_bias") else [module.scale]
    values = [None if param is None else param[...] for param in owned]
    with jax.numpy_dtype_promotion("standard"):
        promoted = module.promote_dtype((x, *running, *values), dtype=module.dtype)
        cast, values = promoted[0], promoted[1 + len(running) :]
        dtype = canonicalize_dtype(cast, *values, *given, dtype=module.dtype)
    if residual is None:
        # Widen x now, but narrow only the result: statistics are measured on x as it was given.
        casts = promote(x.dtype, cast.dtype) != x.dtype
    else:
        # The residual sum has the dtype of x, even if the parameters have a wider one.
        casts = not jnp.issubdtype(x.dtype, jnp.inexact)
    x = cast if casts else x
    learned = NormParams(*(fold_features(value, layout) for value in values))
    return prepare_call(
        name,
        x,
        layout,
        add_params(learned, given, layout, jnp.dtype(dtype)),
        residual=None if residual is None else residual.astype(x.dtype),
        moments=moments,
        dtype=dtype,
        **options_of(module, mask, bind_names=moments is None),
        **options,
    )


def fold_features(value: Any, layout: Layout) -> Any:
    """Reshape an array of shape (num_features,) to the feature axes."""
    if value is None or value.size != math.prod(layout.feature_shape):
        return value
    return value.reshape(layout.feature_shape)
