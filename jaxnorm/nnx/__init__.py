"""Flax nnx modules: drop-ins for the classes of the same names in `flax.nnx`.

Each inherits from Flax's class and replaces `__call__`. Arguments, variables and initialization are
Flax's, so checkpoints load in both directions and `isinstance` holds. The modules own variables and
do no arithmetic. `DynamicErf`, `DynamicTanh`, `FilterResponseNorm` and `GlobalResponseNorm` are not
in Flax; their arguments are in its manner.

`use_fast_variance` is accepted but ignored: statistics are always accurate, and in float32 or
better. `promote_dtype` is called as in Flax, but only the result is rounded to its dtype, not x or
the running statistics. A `mask` is the `where` of the functions.

WeightNorm and SpectralNorm never write into the layer that they wrap. StandardizedLinear and
StandardizedConv are Flax's Linear and Conv with standardized kernels. `fold` makes a model whose
batch norms are part of the layers before them, and `audit` finds what is wrong with batch norms.
"""

from jaxnorm.nnx.add import AddLayerNorm, AddRMSNorm
from jaxnorm.nnx.audit import audit
from jaxnorm.nnx.fold import fold
from jaxnorm.nnx.freeze import freeze, unfreeze
from jaxnorm.nnx.more_norms import (
    DynamicErf,
    DynamicTanh,
    FilterResponseNorm,
    GlobalResponseNorm,
)
from jaxnorm.nnx.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.nnx.recalibrate import recalibrate
from jaxnorm.nnx.replace import replace
from jaxnorm.nnx.weights import (
    SpectralNorm,
    StandardizedConv,
    StandardizedLinear,
    WeightNorm,
)
from jaxnorm.tools.audit import plot_audit
from jaxnorm.tools.findings import Finding, Findings

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm",
    "DynamicErf",
    "DynamicTanh",
    "FilterResponseNorm",
    "Finding",
    "Findings",
    "GlobalResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SpectralNorm",
    "StandardizedConv",
    "StandardizedLinear",
    "WeightNorm",
    "audit",
    "fold",
    "freeze",
    "plot_audit",
    "recalibrate",
    "replace",
    "unfreeze",
]
