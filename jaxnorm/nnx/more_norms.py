"""Norms that Flax has no class for, with their learned arrays."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import call_in_dtype, widened
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.dynamic_erf import dynamic_erf
from jaxnorm.functional.dynamic_tanh import dynamic_tanh
from jaxnorm.functional.filter_response import filter_response_norm
from jaxnorm.functional.global_response import global_response_norm

_HALF = initializers.constant(0.5)


class _Learned(nnx.Module):
    """Scale and bias, each of which is a variable or None."""

    def __init__(
        self,
        num_features: int,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        use_bias: bool,
        use_scale: bool,
        bias_init: Initializer,
        scale_init: Initializer,
        feature_axis: int,
        rngs: nnx.Rngs,
    ):
        make = lambda init: nnx.Param(init(rngs.params(), (num_features,), param_dtype))
        self.scale = make(scale_init) if use_scale else None
        self.bias = make(bias_init) if use_bias else None
        self.num_features = num_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axis = feature_axis

    def _values(self, x: Any, *others: Any) -> tuple[NormParams, list[Any], Dtype]:
        """Scale and bias, other variables' arrays, and the result's dtype."""
        variables = self.scale, self.bias, *others
        arrays = [None if variable is None else variable[...] for variable in variables]
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(widened(x, self.dtype), *arrays, dtype=self.dtype)
        return NormParams(*arrays[:2]), arrays[2:], dtype


class GlobalResponseNorm(_Learned):
    """`jaxnorm.global_response_norm` with learned scale and bias.

    Both start at zero, as in the paper, and then y is x. Arguments are those of Flax's norms;
    `epsilon` and `feature_axis` are those of the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.GlobalResponseNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 3))).shape
      (8, 5, 5, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.zeros,
        feature_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        """Arguments as in Flax."""
        super().__init__(
            num_features,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axis=feature_axis,
            rngs=rngs,
        )
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        params, _, dtype = self._values(x)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(global_response_norm, x, dtype, params, **options)


class FilterResponseNorm(_Learned):
    """`jaxnorm.filter_response_norm` with learned scale, bias and threshold.

    The threshold starts at zero, as in the paper; without `use_threshold` there is none. Other
    arguments are those of Flax's norms; `epsilon` and `feature_axis` are those of the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.FilterResponseNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 3))).shape
      (8, 5, 5, 3)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        use_threshold: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        threshold_init: Initializer = initializers.zeros,
        feature_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        """Arguments as in Flax, and those of the threshold."""
        super().__init__(
            num_features,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axis=feature_axis,
            rngs=rngs,
        )
        self.epsilon = epsilon
        self.use_threshold = use_threshold
        make = lambda init: nnx.Param(init(rngs.params(), (num_features,), param_dtype))
        self.threshold = make(threshold_init) if use_threshold else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        params, (threshold,), dtype = self._values(x, self.threshold)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(filter_response_norm, x, dtype, params, threshold, **options)


class DynamicTanh(_Learned):
    """`jaxnorm.dynamic_tanh` with learned scale, bias, and one alpha, which starts at 0.5.

    Other arguments are those of Flax's norms; `feature_axis` is that of the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.DynamicTanh(3, rngs=nnx.Rngs(0)).alpha[...]
      Array(0.5, dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        alpha_init: Initializer = _HALF,
        feature_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        """Arguments as in Flax, and that of alpha."""
        super().__init__(
            num_features,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axis=feature_axis,
            rngs=rngs,
        )
        self.alpha = nnx.Param(alpha_init(rngs.params(), (), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Bound x."""
        params, (alpha,), dtype = self._values(x, self.alpha)
        return call_in_dtype(dynamic_tanh, x, dtype, alpha, params, feature_axis=self.feature_axis)


class DynamicErf(_Learned):
    """`jaxnorm.dynamic_erf` with learned scale and bias, one alpha and one shift.

    Alpha starts at 0.5 and the shift at 0, as in the paper. Other arguments are those of Flax's
    norms; `feature_axis` is that of the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.DynamicErf(3, rngs=nnx.Rngs(0)).shift[...]
      Array(0., dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        alpha_init: Initializer = _HALF,
        shift_init: Initializer = initializers.zeros,
        feature_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        """Arguments as in Flax, and those of alpha and the shift."""
        super().__init__(
            num_features,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            feature_axis=feature_axis,
            rngs=rngs,
        )
        self.alpha = nnx.Param(alpha_init(rngs.params(), (), param_dtype))
        self.shift = nnx.Param(shift_init(rngs.params(), (), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Bound x."""
        params, (alpha, shift), dtype = self._values(x, self.alpha, self.shift)
        return call_in_dtype(
            dynamic_erf, x, dtype, alpha, shift, params, feature_axis=self.feature_axis
        )
