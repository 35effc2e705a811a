"""Layer and rms norm of a residual sum, which is returned too."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.core.arguments import check_residual
from jaxnorm.core.layouts import layer_layout
from jaxnorm.core.norm import norm_of_sum
from jaxnorm.core.standardize import NormParams
from jaxnorm.linen.module_call import prepare_module_call
from jaxnorm.linen.norms import LayerNorm, RMSNorm


class AddLayerNorm(LayerNorm):
    """`jaxnorm.add_layer_norm` with learned scale and bias: `LayerNorm` of x + residual.

    Arguments and variables are those of LayerNorm. A call takes x and the residual, and returns y
    and the residual sum, which has the dtype of x.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> x, stream = jnp.ones((8, 3)), jnp.zeros((8, 3))
      >>> (y, stream), _ = jn.AddLayerNorm().init_with_output(jax.random.key(0), x, stream)
      >>> stream.sum()
      Array(24., dtype=float32)
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (it takes and returns two)
        self,
        x: jax.Array,
        residual: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Normalize the sum, and return it too."""
        return _add("add_layer_norm", self, x, residual, mask, NormParams(scale, bias))


class AddRMSNorm(RMSNorm):
    """`jaxnorm.add_rms_norm` with a learned scale: `RMSNorm` of x + residual.

    Arguments and variables are those of RMSNorm; a call is that of AddLayerNorm.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> x, stream = jnp.ones((8, 3)), jnp.zeros((8, 3))
      >>> (y, stream), _ = jn.AddRMSNorm().init_with_output(jax.random.key(0), x, stream)
      >>> stream.sum()
      Array(24., dtype=float32)
    """

    @nn.compact
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (it takes and returns two)
        self,
        x: jax.Array,
        residual: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Normalize the sum, and return it too."""
        return _add(
            "add_rms_norm", self, x, residual, mask, NormParams(scale, bias), subtract_mean=False
        )


def _add(name: str, module: Any, x, residual, mask, given: NormParams, **options: Any):
    layout = layer_layout(np.shape(x), module.reduction_axes, module.feature_axes)
    options["residual"] = check_residual(residual, jnp.asarray(x))
    return norm_of_sum(*prepare_module_call(name, module, x, layout, mask, given, **options))
