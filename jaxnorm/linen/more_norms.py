"""Norms that Flax has no class for, with their learned arrays."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from flax.typing import Dtype, Initializer

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import call_in_dtype, widened
from jaxnorm.core.axes import canonical_axes
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.dynamic_erf import dynamic_erf
from jaxnorm.functional.dynamic_tanh import dynamic_tanh
from jaxnorm.functional.filter_response import filter_response_norm
from jaxnorm.functional.global_response import global_response_norm


class GlobalResponseNorm(nn.Module):
    """`jaxnorm.global_response_norm` with learned scale and bias.

    Both start at zero, as in the paper, and then y is x. Arguments are as in Flax's norms;
    `epsilon` and `feature_axis` are as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> norm, x = jn.GlobalResponseNorm(), jnp.ones((8, 5, 5, 3))
      >>> y, variables = norm.init_with_output(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'scale': (3,)}}
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.zeros
    feature_axis: int = -1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        params, _, dtype = _learned(self, x)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(global_response_norm, x, dtype, params, **options)


class FilterResponseNorm(nn.Module):
    """`jaxnorm.filter_response_norm` with learned scale, bias and threshold.

    The threshold starts at zero, as in the paper; without `use_threshold` there is none. Other
    arguments are as in Flax's norms; `epsilon` and `feature_axis` are as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> norm, x = jn.FilterResponseNorm(), jnp.ones((8, 5, 5, 3))
      >>> y, variables = norm.init_with_output(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'scale': (3,), 'threshold': (3,)}}
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    use_threshold: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    threshold_init: Initializer = initializers.zeros
    feature_axis: int = -1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        per_feature = {"threshold": self.threshold_init} if self.use_threshold else {}
        params, threshold, dtype = _learned(self, x, per_feature=per_feature)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(filter_response_norm, x, dtype, params, *threshold, **options)


class DynamicTanh(nn.Module):
    """`jaxnorm.dynamic_tanh` with learned scale, bias, and one alpha, which starts at 0.5.

    Other arguments are as in Flax's norms; `feature_axis` is as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> y, variables = jn.DynamicTanh().init_with_output(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'alpha': (), 'bias': (3,), 'scale': (3,)}}
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    alpha_init: Initializer = initializers.constant(0.5)
    feature_axis: int = -1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the function to x."""
        params, numbers, dtype = _learned(self, x, numbers={"alpha": self.alpha_init})
        return call_in_dtype(
            dynamic_tanh, x, dtype, *numbers, params, feature_axis=self.feature_axis
        )


class DynamicErf(nn.Module):
    """`jaxnorm.dynamic_erf` with learned scale and bias, one alpha and one shift.

    Alpha starts at 0.5 and the shift at 0, as in the paper. Other arguments are as in Flax's norms;
    `feature_axis` is as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> y, variables = jn.DynamicErf().init_with_output(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'alpha': (), 'bias': (3,), 'scale': (3,), 'shift': ()}}
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    alpha_init: Initializer = initializers.constant(0.5)
    shift_init: Initializer = initializers.zeros
    feature_axis: int = -1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the function to x."""
        numbers = {"alpha": self.alpha_init, "shift": self.shift_init}
        params, numbers, dtype = _learned(self, x, numbers=numbers)
        return call_in_dtype(
            dynamic_erf, x, dtype, *numbers, params, feature_axis=self.feature_axis
        )


def _learned(
    module: Any, x, *, per_feature: dict | None = None, numbers: dict | None = None
) -> tuple[NormParams, list[jax.Array], Dtype]:
    """Return scale and bias, the module's other arrays, and the dtype of the result."""
    (axis,) = canonical_axes((module.feature_axis,), np.ndim(x), "feature_axis")
    shape, dtype = (np.shape(x)[axis],), module.param_dtype
    scale = module.param("scale", module.scale_init, shape, dtype) if module.use_scale else None
    bias = module.param("bias", module.bias_init, shape, dtype) if module.use_bias else None
    others = [module.param(n, f, shape, dtype) for n, f in (per_feature or {}).items()]
    others += [module.param(n, f, (), dtype) for n, f in (numbers or {}).items()]
    with jax.numpy_dtype_promotion("standard"):
        x = widened(x, module.dtype)
        dtype = canonicalize_dtype(x, scale, bias, *others, dtype=module.dtype)
    return NormParams(scale, bias), others, dtype
