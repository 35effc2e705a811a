"""The five norms: Flax's classes with another `__call__`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxnorm._internals import first_from
from jaxnorm._modules import (
    initial_scale,
    update_running_statistics,
    warn_of_single_elements,
)
from jaxnorm._signatures import flax_positions, inherit_signature
from jaxnorm.core.arguments import check_feature_shape, check_flag
from jaxnorm.core.layouts import batch_layout, group_layout, instance_layout, layer_layout
from jaxnorm.core.norm import norm
from jaxnorm.core.standardize import NormParams
from jaxnorm.functional.renorm import Renorm, check_renorm, normalize_batch, without_kernel
from jaxnorm.nnx.module_call import fold_features, prepare_module_call


def _with_offset(inherited: Callable) -> Any:
    """Extend the constructor of a norm of Flax by an offset of the scale."""

    @inherit_signature(inherited)
    def __init__(self, *arguments: Any, scale_offset: float = 0.0, **named: Any):  # noqa: N807
        """Take Flax's arguments, and an offset of the scale."""
        inherited(self, *arguments, **_initialized(named, scale_offset))
        self.scale_offset = scale_offset

    return __init__


class BatchNorm(nnx.BatchNorm):
    """`jaxnorm.batch_norm` with learned scale and bias and running statistics.

    `use_running_average` is `not train`, `axis` is `feature_axis`; other arguments are those of the
    function. `renorm` is given as numbers to the constructor, or to a call, which wins and may
    trace it. `train()`, `eval()` and `nnx.view` set `use_running_average`; a call may override it.
    Under `nnx.vmap`, give `axis_name` if one module serves all examples. While `frozen` is set
    (`jaxnorm.nnx.freeze`), nothing makes the norm use the batch or move its running statistics.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> norm = jn.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = norm(10.0 * jnp.ones((8, 3)))
      >>> norm.mean[...]
      Array([1., 1., 1.], dtype=float32)
    """

    frozen: bool = False

    @inherit_signature(nnx.BatchNorm.__init__)
    def __init__(
        self,
        *arguments: Any,
        virtual_batch_size: int | None = None,
        scale_offset: float = 0.0,
        renorm: Renorm | None = None,
        **named: Any,
    ):
        """Take Flax's arguments, and those of ghost batch norm and renormalization."""
        super().__init__(*arguments, **_initialized(named, scale_offset))
        self.virtual_batch_size = virtual_batch_size
        self.scale_offset = scale_offset
        self.renorm = check_renorm(renorm)  # numbers: an array would have to be a variable

    @flax_positions
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (mask has a position)
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        mask: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
        renorm: Renorm | None = None,
    ) -> jax.Array:
        """Normalize x, and in training update the running statistics."""
        use_running_average = self.frozen or check_flag(
            first_from(
                use_running_average,
                self.use_running_average,
                error_msg="use_running_average must be given, got None; pass it to the "
                "constructor or the call, or choose with train(), eval() or nnx.view.",
            ),
            "use_running_average",
        )
        size = None if use_running_average else self.virtual_batch_size
        layout = batch_layout(np.shape(x), self.axis, size, "axis")
        renorm = check_renorm(self.renorm if renorm is None else renorm)
        mean, var = (
            check_feature_shape(fold_features(stat[...], layout), name, layout)
            for stat, name in ((self.mean, "mean"), (self.var, "var"))
        )
        prepare = functools.partial(
            prepare_module_call,
            "batch_norm",
            self,
            x,
            layout,
            mask,
            NormParams(scale, bias),
            running=(mean, var),
        )
        if use_running_average:
            return norm(*prepare(moments=(mean, var)))
        call = prepare(implementation=without_kernel(renorm))
        y, moments = normalize_batch(*call, mean, var, renorm)
        updated = update_running_statistics(mean, var, moments, self.momentum, moments.mean.dtype)
        for stat, value in zip((self.mean, self.var), updated, strict=True):
            # A variable that is a reference must not keep a tracer of jax.grad.
            value = jax.lax.stop_gradient(value.reshape(stat.shape))
            if jnp.iscomplexobj(value) == jnp.iscomplexobj(stat[...]):
                stat[...] = value.astype(stat.dtype)
            else:  # the first complex mean
                stat.set_value(value)
        return y


class LayerNorm(nnx.LayerNorm):
    """`jaxnorm.layer_norm` with learned scale and bias.

    Statistics are shared over `reduction_axes`, and over the devices of `axis_name` if x is sharded
    along those axes; scale and bias span `feature_axes`. Other arguments are as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.LayerNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 3))).shape
      (8, 3)
    """

    __init__: Callable[..., None] = _with_offset(nnx.LayerNorm.__init__)

    @flax_positions
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (mask has a position)
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        layout = layer_layout(np.shape(x), self.reduction_axes, self.feature_axes)
        return norm(
            *prepare_module_call("layer_norm", self, x, layout, mask, NormParams(scale, bias))
        )


class RMSNorm(nnx.RMSNorm):
    """`jaxnorm.rms_norm` with a learned scale; arguments as in LayerNorm.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.RMSNorm(3, rngs=nnx.Rngs(0))(jnp.ones((8, 3))).shape
      (8, 3)
    """

    __init__: Callable[..., None] = _with_offset(nnx.RMSNorm.__init__)

    @flax_positions
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
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


class GroupNorm(nnx.GroupNorm):
    """`jaxnorm.group_norm` with learned scale and bias.

    Give `num_groups`, or `num_groups=None` and `group_size`. The features are the last axis;
    `reduction_axes`, which must hold it, are all but the first unless given.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 6))).shape
      (8, 5, 5, 6)
    """

    __init__: Callable[..., None] = _with_offset(nnx.GroupNorm.__init__)

    @flax_positions
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (mask has a position)
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        features, shape = self.num_groups * self.group_size, np.shape(x)
        if shape[-1:] != (features,):
            raise ValueError(
                f"x must have the {features} features that this module was made for, got shape "
                f"{shape}; make the module for the last axis of x, or move the features there with "
                "jnp.moveaxis."
            )
        layout = group_layout(shape, self.num_groups, reduction_axes=self.reduction_axes)
        return norm(
            *prepare_module_call("group_norm", self, x, layout, mask, NormParams(scale, bias))
        )


class InstanceNorm(nnx.InstanceNorm):
    """`jaxnorm.instance_norm` with learned scale and bias.

    `feature_axes` is `feature_axis`, or several of them; other arguments are as in the function.

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> jn.InstanceNorm(6, rngs=nnx.Rngs(0))(jnp.ones((8, 5, 5, 6))).shape
      (8, 5, 5, 6)
    """

    __init__: Callable[..., None] = _with_offset(nnx.InstanceNorm.__init__)

    @flax_positions
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (mask has a position)
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        scale: jax.Array | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize x."""
        layout = instance_layout(np.shape(x), self.feature_axes, "feature_axes")
        warn_of_single_elements(layout)
        return norm(
            *prepare_module_call("instance_norm", self, x, layout, mask, NormParams(scale, bias))
        )


def _initialized(named: dict[str, Any], scale_offset: float) -> dict[str, Any]:
    """Add an initial scale that changes nothing to the arguments of a constructor."""
    scale_init = nnx.initializers.constant(initial_scale(scale_offset))
    return {"scale_init": scale_init, **named}
