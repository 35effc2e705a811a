"""Layers whose weights are normalized: Flax's classes with another `__call__`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer

from jaxnorm._internals import canonicalize_dtype
from jaxnorm._modules import (
    check_matrix,
    check_no_mask,
    spectrally_normalized,
    weight_normalized,
)
from jaxnorm.core.arguments import check_flag
from jaxnorm.core.layouts import batch_layout
from jaxnorm.functional.standardized_weight import standardize_weight


class WeightNorm(nn.WeightNorm):
    """`jaxnorm.weight_norm` of the weights of a layer, with a learned scale.

    The parameters of the layer are v, and the scale is g. `feature_axes` is `feature_axis`, and
    None is (); other arguments are as in Flax. The parameters are never written: initialization
    leaves them as the layer makes them, where Flax's divides them by their norm.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxnorm.linen as jn
      >>> class Layers(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return jn.WeightNorm(nn.Dense(4))(x)
      >>> variables = Layers().init(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables["params"]["WeightNorm_0"])
      {'Dense_0/kernel/scale': (4,)}
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with normalized weights."""
        return _call(self, self._normalized, args, kwargs)

    def _normalized(self, name: str, weights: jax.Array) -> jax.Array:
        if self.variable_filter and not any(part in name for part in self.variable_filter):
            return weights
        features = () if self.feature_axes is None else self.feature_axes
        scale = None
        if self.use_scale:
            shape = batch_layout(weights.shape, features, name="feature_axes").feature_shape
            scale = self.param(name + "/scale", self.scale_init, shape, self.param_dtype)
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(weights, scale, dtype=self.dtype)
        return weight_normalized(weights, scale, features, self.epsilon, dtype)


class SpectralNorm(nn.SpectralNorm):
    """`jaxnorm.spectral_norm` of the weights of a layer, with u and sigma in `batch_stats`.

    `n_steps` is `steps`, `update_stats` of a call is `train`; other arguments are as in Flax.
    The parameters of the layer are never written. Without `update_stats` there is no iteration: v
    is that of u, so that sigma is |W u|. Initialization leaves u and sigma.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, jaxnorm.linen as jn
      >>> class Layers(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         return jn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
      >>> variables = Layers().init(jax.random.key(0), jnp.ones((8, 3)), train=True)
      >>> jax.tree.map(jnp.shape, variables["batch_stats"]["SpectralNorm_0"])
      {'Dense_0/kernel/sigma': (), 'Dense_0/kernel/u': (1, 4)}
    """

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Call the layer with normalized weights, and in training update u and sigma."""
        update_stats = check_flag(update_stats, "update_stats")

        def normalized(name: str, weights: jax.Array) -> jax.Array:
            return self._normalized(name, weights, update_stats)

        return _call(self, normalized, args, kwargs)

    def _normalized(self, name: str, weights: jax.Array, update_stats: bool) -> jax.Array:
        if weights.ndim <= 1 or self.n_steps < 1:
            return weights
        check_matrix(self.error_on_non_matrix, name, weights.shape)
        known = self.has_variable(self.collection_name, name + "/u")
        u, sigma = (
            self.variable(self.collection_name, f"{name}/{part}", init, *arguments)
            for part, init, *arguments in (
                (
                    "u",
                    jax.random.normal,
                    None if known else self.make_rng("params"),
                    (1, weights.shape[-1]),
                    self.param_dtype,
                ),
                ("sigma", jnp.ones, (), self.param_dtype),
            )
        )
        with jax.numpy_dtype_promotion("standard"):
            dtype = canonicalize_dtype(weights, u.value, sigma.value, dtype=self.dtype)
        steps = self.n_steps if update_stats else 0
        y, new_u, new_sigma = spectrally_normalized(weights, u.value, steps, self.epsilon, dtype)
        if update_stats and not self.is_initializing():
            u.value, sigma.value = new_u, new_sigma.astype(sigma.value.dtype)
        return y


class StandardizedDense(nn.Dense):
    """Flax's Dense with `jaxnorm.standardize_weight` of its kernel.

    Arguments are those of Dense, and of the function. With `use_gain` there is a parameter `gain`
    of shape (features,).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> layer = jn.StandardizedDense(4, fan_in=True, use_gain=True)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 3)))
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'bias': (4,), 'gain': (4,), 'kernel': (3, 4)}}
    """

    epsilon: float = 1e-6
    fan_in: bool = False
    use_gain: bool = False
    gain_init: Initializer = nn.initializers.ones

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return a parameter, standardized if it is the kernel."""
        return _standardized(self, name, super().param(name, *args, **kwargs))


class StandardizedConv(nn.Conv):
    """Flax's Conv with `jaxnorm.standardize_weight` of its kernel.

    Arguments are those of Conv, without a mask, and of the function. With `use_gain` there is a
    parameter `gain` of shape (features,).

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.linen as jn
      >>> layer = jn.StandardizedConv(16, (3, 3))
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((8, 5, 5, 6)))[0].shape
      (8, 5, 5, 16)
    """

    epsilon: float = 1e-6
    fan_in: bool = False
    use_gain: bool = False
    gain_init: Initializer = nn.initializers.ones

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return a parameter, standardized if it is the kernel."""
        check_no_mask(self.mask)
        return _standardized(self, name, super().param(name, *args, **kwargs))


def _standardized(module: Any, name: str, value: Any) -> Any:
    if name != "kernel":
        return value
    gain = None
    if module.use_gain:
        gain = module.param("gain", module.gain_init, (value.shape[-1],), module.param_dtype)
    return standardize_weight(value, gain, epsilon=module.epsilon, fan_in=module.fan_in)


def _call(module: Any, normalized: Callable, args: tuple, kwargs: dict) -> Any:
    """Call the module's layer with each of its parameters normalized.

    Flax's option `init` of `map_variables` would store the normalized parameters, and so would
    `mutable`. Here the layer makes its parameters in a call of its own, and then they are read.
    """
    layer = module.layer_instance
    if module.is_initializing():
        layer(*args, **kwargs)

    def of_path(path, weights):
        inside = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        return normalized(f"{layer.name}/{inside}", jnp.asarray(weights))

    return nn.map_variables(
        lambda layer: layer(*args, **kwargs),
        "params",
        lambda variables: jax.tree_util.tree_map_with_path(of_path, variables),
    )(layer)
