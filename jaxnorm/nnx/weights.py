"""Layers whose weights are normalized: Flax's classes with another `__call__`."""

from typing import Any

import jax
from flax import nnx
from flax.typing import Initializer

from jaxnorm._internals import canonicalize_dtype, first_from
from jaxnorm._modules import (
    check_matrix,
    check_no_mask,
    spectrally_normalized,
    weight_normalized,
)
from jaxnorm._signatures import inherit_signature
from jaxnorm.core.arguments import check_flag
from jaxnorm.core.layouts import batch_layout
from jaxnorm.functional.standardized_weight import standardize_weight

Path = tuple[Any, ...]


class WeightNorm(nnx.WeightNorm):
    """`jaxnorm.weight_norm` of the weights of a layer, with a learned scale.

    The parameters of the layer are v, and the scale is g. `feature_axes` is `feature_axis`, and
    None is (); other arguments are as in Flax. Each of `scales` is an `nnx.Param`, so that it
    trains. The parameters of the layer are never written.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> layer = jn.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 3))).shape
      (8, 4)
      >>> layer.scales[("kernel",)].shape
      (4,)
    """

    @inherit_signature(nnx.WeightNorm.__init__)
    def __init__(self, *arguments: Any, **named: Any):
        """Take Flax's arguments."""
        use_scale = named.pop("use_scale", True)
        super().__init__(*arguments, use_scale=False, **named)
        self.use_scale = use_scale
        if use_scale:
            rngs = named["rngs"]
            self.scales = nnx.data(
                {
                    path: nnx.Param(
                        self.scale_init(rngs.params(), self._features(param), self.param_dtype)
                    )
                    for path, param in parameters(self.layer_instance)
                    if self.variable_filter(path, param)
                }
            )

    def _features(self, param: Any) -> tuple[int, ...]:
        return batch_layout(param.shape, self.feature_axes, name="feature_axes").feature_shape

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with normalized weights."""
        weights = {
            path: self._normalized(path, param[...])
            for path, param in parameters(self.layer_instance)
            if self.variable_filter(path, param)
        }
        return with_weights(self.layer_instance, weights)(x, *args, **kwargs)

    def _normalized(self, path: Path, weights: jax.Array) -> jax.Array:
        scale = None
        if self.use_scale:
            assert self.scales is not None
            scale = self.scales[path][...]
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(weights, scale, dtype=self.dtype)
        return weight_normalized(weights, scale, self.feature_axes, self.epsilon, dtype)


class SpectralNorm(nnx.SpectralNorm):
    """`jaxnorm.spectral_norm` of the weights of a layer, with u and sigma in `batch_stats`.

    `n_steps` is `steps`, `update_stats` is `train`; other arguments are as in Flax. `train()`,
    `eval()` and `nnx.view` set `update_stats`; a call may override it. The parameters of the layer
    are never written. Without `update_stats` there is no iteration: v is that of u, so that sigma
    is |W u|.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> layer = jn.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 3))).shape
      (8, 4)
    """

    def __call__(
        self, x: jax.Array, update_stats: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Call the layer with normalized weights, and in training update u and sigma."""
        update_stats = first_from(
            update_stats,
            not self.use_running_average,
            error_msg="update_stats must be given, got None; pass it to the constructor or the "
            "call, or choose with train(), eval() or nnx.view.",
        )
        update_stats = check_flag(update_stats, "update_stats")
        weights = {
            path: self._normalized(path, param[...], update_stats)
            for path, param in parameters(self.layer_instance)
            if param.ndim > 1 and self.n_steps > 0
        }
        return with_weights(self.layer_instance, weights)(x, *args, **kwargs)

    def _normalized(self, path: Path, weights: jax.Array, update_stats: bool) -> jax.Array:
        check_matrix(self.error_on_non_matrix, "/".join(map(str, path)), weights.shape)
        u, sigma = (self.batch_stats[(*path, name)] for name in ("u", "sigma"))
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(weights, u[...], sigma[...], dtype=self.dtype)
        steps = self.n_steps if update_stats else 0
        y, new_u, new_sigma = spectrally_normalized(weights, u[...], steps, self.epsilon, dtype)
        if update_stats:
            u[...] = new_u
            # A variable that is a reference must not keep a tracer of jax.grad.
            sigma[...] = jax.lax.stop_gradient(new_sigma).astype(sigma.dtype)
        return y


class StandardizedLinear(nnx.Linear):
    """Flax's Linear with `jaxnorm.standardize_weight` of its kernel.

    Arguments are those of Linear, and of the function. With `use_gain` there is a parameter `gain`
    of shape (out_features,).

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> layer = jn.StandardizedLinear(3, 4, fan_in=True, use_gain=True, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 3))).shape
      (8, 4)
    """

    @inherit_signature(nnx.Linear.__init__)
    def __init__(
        self,
        *arguments: Any,
        epsilon: float = 1e-6,
        fan_in: bool = False,
        use_gain: bool = False,
        gain_init: Initializer = nnx.initializers.ones,
        **named: Any,
    ):
        """Take Flax's arguments, and those of the function."""
        super().__init__(*arguments, **named)
        _add_gain(self, epsilon, fan_in, use_gain, gain_init, named["rngs"])

    @inherit_signature(nnx.Linear.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Call Flax's layer with the standardized kernel."""
        return nnx.Linear.__call__(_standardized(self), *args, **kwargs)


class StandardizedConv(nnx.Conv):
    """Flax's Conv with `jaxnorm.standardize_weight` of its kernel.

    Arguments are those of Conv, without a mask, and of the function. With `use_gain` there is a
    parameter `gain` of shape (out_features,).

    Examples:
      >>> import jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> layer = jn.StandardizedConv(6, 16, (3, 3), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 5, 5, 6))).shape
      (8, 5, 5, 16)
    """

    @inherit_signature(nnx.Conv.__init__)
    def __init__(
        self,
        *arguments: Any,
        epsilon: float = 1e-6,
        fan_in: bool = False,
        use_gain: bool = False,
        gain_init: Initializer = nnx.initializers.ones,
        **named: Any,
    ):
        """Take Flax's arguments, and those of the function."""
        super().__init__(*arguments, **named)
        check_no_mask(self.mask)
        _add_gain(self, epsilon, fan_in, use_gain, gain_init, named["rngs"])

    @inherit_signature(nnx.Conv.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Call Flax's layer with the standardized kernel."""
        return nnx.Conv.__call__(_standardized(self), *args, **kwargs)


def _add_gain(module: Any, epsilon, fan_in, use_gain, gain_init, rngs) -> None:
    module.epsilon, module.fan_in, module.use_gain = epsilon, fan_in, use_gain
    shape, dtype = (module.out_features,), module.param_dtype
    gain = nnx.Param(gain_init(rngs.params(), shape, dtype)) if use_gain else None
    module.gain = nnx.data(gain)


def _standardized(module: Any) -> Any:
    gain = None if module.gain is None else module.gain[...]
    kernel = standardize_weight(
        module.kernel[...], gain, epsilon=module.epsilon, fan_in=module.fan_in
    )
    return with_weights(module, {("kernel",): kernel})


def parameters(module: nnx.Module) -> list[tuple[Path, Any]]:
    """Return the parameters of a module by their paths."""
    return list(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def with_weights(module: Any, weights: dict[Path, jax.Array]) -> Any:
    """Copy a module with other values for some parameters; share all other variables."""
    graph, state = nnx.split(module)
    flat = [
        (path, variable.replace(weights[path]) if path in weights else variable)
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))
