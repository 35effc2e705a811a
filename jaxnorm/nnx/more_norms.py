"""Norms that Flax has no class for, with their learned arrays."""

from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import initializers
from flax.typing import Dtype, Initializer

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import call_in_dtype, widened
from jaxnorm._signatures import inherit_signature
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.dynamic_erf import dynamic_erf
from jaxnorm.functional.dynamic_tanh import dynamic_tanh
from jaxnorm.functional.filter_response import filter_response_norm
from jaxnorm.functional.global_response import global_response_norm

_HALF = initializers.constant(0.5)


class _Options(TypedDict, total=False):
    """Arguments that all constructors pass on."""

    dtype: Dtype | None
    param_dtype: Dtype
    use_bias: bool
    use_scale: bool
    bias_init: Initializer
    feature_axis: int


class _Learned(nnx.Module):
    """Scale and bias, each of which is a variable or None; arguments are as in Flax's norms."""

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
        feature_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        self.num_features = num_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.feature_axis = feature_axis
        self.scale = self._param(scale_init, rngs) if use_scale else None
        self.bias = self._param(bias_init, rngs) if use_bias else None

    def _param(self, init: Initializer, rngs: nnx.Rngs, shape: tuple[int, ...] | None = None):
        shape = (self.num_features,) if shape is None else shape
        return nnx.Param(init(rngs.params(), shape, self.param_dtype))

    def _values(self, x: Any, *others: Any) -> tuple[NormParams, list[Any], Dtype]:
        """Return scale and bias, other variables' arrays, and the dtype of the result."""
        variables = self.scale, self.bias, *others
        arrays = [None if variable is None else variable[...] for variable in variables]
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(widened(x, self.dtype), *arrays, dtype=self.dtype)
        return NormParams(*arrays[:2]), arrays[2:], dtype


class GlobalResponseNorm(_Learned):
    """`jaxnorm.global_response_norm` with learned scale and bias.

    Both start at zero, as in the paper, and then y is x. Arguments are as in Flax's norms;
    `epsilon` and `feature_axis` are as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.GlobalResponseNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 3))).shape
      (8, 5, 5, 3)
    """

    @inherit_signature(_Learned.__init__)
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        scale_init: Initializer = initializers.zeros,
        rngs: nnx.Rngs,
        **options: Unpack[_Options],
    ):
        """Take arguments as in Flax."""
        super().__init__(num_features, scale_init=scale_init, rngs=rngs, **options)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        params, _, dtype = self._values(x)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(global_response_norm, x, dtype, params, **options)


class FilterResponseNorm(_Learned):
    """`jaxnorm.filter_response_norm` with learned scale, bias and threshold.

    The threshold starts at zero, as in the paper; without `use_threshold` there is none. Other
    arguments are as in Flax's norms; `epsilon` and `feature_axis` are as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.FilterResponseNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 3))).shape
      (8, 5, 5, 3)
    """

    @inherit_signature(_Learned.__init__)
    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        use_threshold: bool = True,
        threshold_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        rngs: nnx.Rngs,
        **options: Unpack[_Options],
    ):
        """Take arguments as in Flax, and those of the threshold."""
        super().__init__(num_features, scale_init=scale_init, rngs=rngs, **options)
        self.epsilon = epsilon
        self.use_threshold = use_threshold
        self.threshold = self._param(threshold_init, rngs) if use_threshold else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x."""
        params, (threshold,), dtype = self._values(x, self.threshold)
        options = {"feature_axis": self.feature_axis, "epsilon": self.epsilon}
        return call_in_dtype(filter_response_norm, x, dtype, params, threshold, **options)


class DynamicTanh(_Learned):
    """`jaxnorm.dynamic_tanh` with learned scale, bias, and one alpha, which starts at 0.5.

    Other arguments are as in Flax's norms; `feature_axis` is as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.DynamicTanh(3, rngs=nnx.Rngs(0)).alpha[...]
      Array(0.5, dtype=float32)
    """

    @inherit_signature(_Learned.__init__)
    def __init__(
        self,
        num_features: int,
        *,
        alpha_init: Initializer = _HALF,
        scale_init: Initializer = initializers.ones,
        rngs: nnx.Rngs,
        **options: Unpack[_Options],
    ):
        """Take arguments as in Flax, and the initializer of alpha."""
        super().__init__(num_features, scale_init=scale_init, rngs=rngs, **options)
        self.alpha = self._param(alpha_init, rngs, ())

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the function to x."""
        params, (alpha,), dtype = self._values(x, self.alpha)
        return call_in_dtype(dynamic_tanh, x, dtype, alpha, params, feature_axis=self.feature_axis)


class DynamicErf(_Learned):
    """`jaxnorm.dynamic_erf` with learned scale and bias, one alpha and one shift.

    Alpha starts at 0.5 and the shift at 0, as in the paper. Other arguments are as in Flax's norms;
    `feature_axis` is as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.DynamicErf(3, rngs=nnx.Rngs(0)).shift[...]
      Array(0., dtype=float32)
    """

    @inherit_signature(_Learned.__init__)
    def __init__(
        self,
        num_features: int,
        *,
        alpha_init: Initializer = _HALF,
        shift_init: Initializer = initializers.zeros,
        scale_init: Initializer = initializers.ones,
        rngs: nnx.Rngs,
        **options: Unpack[_Options],
    ):
        """Take arguments as in Flax, and those of alpha and the shift."""
        super().__init__(num_features, scale_init=scale_init, rngs=rngs, **options)
        self.alpha = self._param(alpha_init, rngs, ())
        self.shift = self._param(shift_init, rngs, ())

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the function to x."""
        params, (alpha, shift), dtype = self._values(x, self.alpha, self.shift)
        return call_in_dtype(
            dynamic_erf, x, dtype, alpha, shift, params, feature_axis=self.feature_axis
        )
