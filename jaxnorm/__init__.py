"""Normalization for JAX: batch, layer, rms, group and instance norm as pure functions.

The modules for Flax are in `jaxnorm.linen` and `jaxnorm.nnx`, those for Equinox in
`jaxnorm.equinox`; importing this package alone imports neither Flax nor Equinox.
"""

from typing import TYPE_CHECKING

from jaxnorm.core.moments import Moments
from jaxnorm.core.standardize import NormParams, init_params
from jaxnorm.functional.add_layer import add_layer_norm
from jaxnorm.functional.add_rms import add_rms_norm
from jaxnorm.functional.batch import batch_norm
from jaxnorm.functional.dynamic_erf import dynamic_erf
from jaxnorm.functional.dynamic_tanh import dynamic_tanh
from jaxnorm.functional.filter_response import filter_response_norm
from jaxnorm.functional.fold import fold_batch_norm
from jaxnorm.functional.global_response import global_response_norm
from jaxnorm.functional.group import group_norm
from jaxnorm.functional.instance import instance_norm
from jaxnorm.functional.layer import layer_norm
from jaxnorm.functional.local_response import local_response_norm
from jaxnorm.functional.moments import merge_moments, moments
from jaxnorm.functional.normalize import denormalize, normalize
from jaxnorm.functional.padding import pad_batch
from jaxnorm.functional.renorm import Renorm
from jaxnorm.functional.rms import rms_norm
from jaxnorm.functional.spectral import (
    SpectralNormState,
    init_spectral_norm_state,
    spectral_norm,
)
from jaxnorm.functional.standardized_weight import standardize_weight
from jaxnorm.functional.state import BatchNormState, init_batch_norm_state, update_batch_norm_state
from jaxnorm.functional.unit import unit_norm
from jaxnorm.functional.weight import init_weight_norm, weight_norm
from jaxnorm.kernels import KernelUnavailableError, implementations

__version__ = "0.1.0"

__all__ = [
    "BatchNormState",
    "KernelUnavailableError",
    "Moments",
    "NormParams",
    "Renorm",
    "SpectralNormState",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "denormalize",
    "dynamic_erf",
    "dynamic_tanh",
    "filter_response_norm",
    "fold_batch_norm",
    "global_response_norm",
    "group_norm",
    "implementations",
    "init_batch_norm_state",
    "init_params",
    "init_spectral_norm_state",
    "init_weight_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "merge_moments",
    "moments",
    "normalize",
    "pad_batch",
    "rms_norm",
    "spectral_norm",
    "standardize_weight",
    "unit_norm",
    "update_batch_norm_state",
    "weight_norm",
]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        text = f"module 'jaxnorm' has no attribute {name!r}"
        if name in ("convert", "equinox", "linen", "nnx"):
            text += f": import jaxnorm.{name}"
        elif name[:1].isupper():
            text += (
                ": modules are in jaxnorm.nnx and jaxnorm.linen, for example jaxnorm.nnx.LayerNorm"
            )
        raise AttributeError(text)
