"""The five norms: Flax's classes with another `__call__`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._modules import (
    update_running_statistics,
    warn_of_single_elements,
)
from jaxnorm.core.arguments import check_feature_shape, check_flag
from jaxnorm.core.axes import count_groups
from jaxnorm.core.layouts import batch_layout, group_layout, instance_layout, layer_layout
from jaxnorm.core.norm import norm
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.renorm import Renorm, check_renorm, normalize_batch, without_kernel
from jaxnorm.linen.module_call import prepare_module_call


class BatchNorm(nn.BatchNorm):
    """`jaxnorm.batch_norm` with learned scale and bias and running statistics in `batch_stats`.

    `use_running_average` is `not train`, `axis` is `feature_axis`; other arguments are those of the
    function. `renorm` is given as numbers to the constructor, or to a call, which wins and may
    trace it. While the module is initialized, nothing has to bind `axis_name`, and the running
    statistics do not change. With `frozen=True` they never change and are always used, whatever
    `use_running_average` is.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> x = jnp.ones((8, 3))
      >>> norm = jn.BatchNorm(use_running_average=False)
      >>> variables = norm.init(jax.random.key(0), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> jax.tree.map(jnp.shape, updates)
      {'batch_stats': {'mean': (3,), 'var': (3,)}}
    """

    virtual_batch_size: int | None = None
    scale_offset: float = 0.0
    renorm: Renorm | None = None
    frozen: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        renorm: Renorm | None = None,
    ) -> jax.Array:
        """Normalize x, and in training update the running statistics."""
        name = "use_running_average"
        use_running_average = self.frozen or check_flag(
            nn.merge_param(name, self.use_running_average, use_running_average), name
        )
        size = None if use_running_average else self.virtual_batch_size
        layout = batch_layout(np.shape(x), self.axis, size, "axis")
        renorm = check_renorm(self.renorm if renorm is None else renorm)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, layout.feature_shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, layout.feature_shape, stats_dtype)
        check_feature_shape(mean.value, "mean", layout)
        check_feature_shape(var.value, "var", layout)
        prepare = functools.partial(
            prepare_module_call, "batch_norm", self, x, layout, mask, NormParams(scale, bias)
        )
        if use_running_average:
            return norm(*prepare(moments=(mean.value, var.value)))
        call = prepare(implementation=without_kernel(renorm))
        y, moments = normalize_batch(*call, mean.value, var.value, renorm)
        if not self.is_initializing():
            dtype = self.dtype or jnp.result_type(x)
            mean.value, var.value = update_running_statistics(
                mean.value, var.value, moments, self.momentum, dtype
            )
        return y


class LayerNorm(nn.LayerNorm):
    """`jaxnorm.layer_norm` with learned scale and bias.

    Statistics are shared over `reduction_axes`, and over the devices of `axis_name` if x is sharded
    along those axes; scale and bias span `feature_axes`. Other arguments are as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> y, variables = jn.LayerNorm().init_with_output(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (3,), 'scale': (3,)}}
    """

    scale_offset: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        layout = layer_layout(np.shape(x), self.reduction_axes, self.feature_axes)
        return norm(
            *prepare_module_call("layer_norm", self, x, layout, mask, NormParams(scale, bias))
        )


class RMSNorm(nn.RMSNorm):
    """`jaxnorm.rms_norm` with a learned scale; arguments as in LayerNorm.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> y, variables = jn.RMSNorm().init_with_output(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'scale': (3,)}}
    """

    scale_offset: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        layout = layer_layout(np.shape(x), self.reduction_axes, self.feature_axes)
        return norm(
            *prepare_module_call(
                "rms_norm", self, x, layout, mask, NormParams(scale, bias), subtract_mean=False
            )
        )


class GroupNorm(nn.GroupNorm):
    """`jaxnorm.group_norm` with learned scale and bias.

    Give `num_groups`, or `num_groups=None` and `group_size`. The features are the last axis;
    `reduction_axes`, which must hold it, are all but the first unless given.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> norm = jn.GroupNorm(num_groups=None, group_size=2)
      >>> norm.init_with_output(jax.random.key(0), jnp.ones((8, 5, 5, 6)))[0].shape
      (8, 5, 5, 6)
    """

    scale_offset: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        shape = np.shape(x)
        num_groups = count_groups(shape[-1], self.num_groups, self.group_size)
        layout = group_layout(shape, num_groups, reduction_axes=self.reduction_axes)
        return norm(
            *prepare_module_call("group_norm", self, x, layout, mask, NormParams(scale, bias))
        )


class InstanceNorm(nn.InstanceNorm):
    """`jaxnorm.instance_norm` with learned scale and bias.

    `feature_axes` is `feature_axis`, or several of them; other arguments are as in the function.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> norm = jn.InstanceNorm()
      >>> norm.init_with_output(jax.random.key(0), jnp.ones((8, 5, 5, 6)))[0].shape
      (8, 5, 5, 6)
    """

    scale_offset: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        layout = instance_layout(np.shape(x), self.feature_axes, "feature_axes")
        warn_of_single_elements(layout)
        return norm(
            *prepare_module_call("instance_norm", self, x, layout, mask, NormParams(scale, bias))
        )
