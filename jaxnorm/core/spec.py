"""The static part of a call of a norm: everything but the arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxnorm.core.devices import LOCAL, Devices
from jaxnorm.core.layout import Layout


class NormSpec(NamedTuple):
    """A norm of arrays of one shape; hashable, so that it is a static argument of programs.

    Attributes:
      name: of the function, for profiles.
      layout: which elements share statistics.
      compute_dtype: of the arithmetic; float32 or better.
      dtype: of y.
      epsilon: added to the variance.
      subtract_mean: whether the mean is measured and subtracted.
      scale_offset: added to the scale.
      has_residual: whether a residual is added to x, and the norm is that of the sum.
      devices: the devices that share the moments.
      implementation: "xla" for the formula; None for a kernel if one supports this, else the
        formula; "kernel" if it is an error that none does.
      differentiated: whether the statistics are kept for a derivative, or y alone is wanted.
      batch_dims: how many leading axes `vmap` has added to x, to the statistics and to the
        (co)tangents of both; the parameters have none of them.
      param_gradients: whether the cotangents of the parameters are wanted.
    """

    name: str
    layout: Layout
    compute_dtype: jnp.dtype
    dtype: jnp.dtype
    epsilon: float = 0.0
    subtract_mean: bool = True
    scale_offset: float = 0.0
    has_residual: bool = False
    devices: Devices = LOCAL
    implementation: str | None = None
    differentiated: bool = False
    batch_dims: int = 0
    param_gradients: bool = True

    @property
    def statistics_devices(self) -> Devices:
        """The devices that share the statistics of y; those of sub-batches are local."""
        return LOCAL if self.layout.sub_batches else self.devices

    def prepare(self, x: jax.Array) -> jax.Array:
        """Cast x, a statistic or a parameter to the dtype of the arithmetic."""
        return x.astype(self.compute_dtype)
