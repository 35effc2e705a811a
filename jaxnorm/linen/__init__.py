"""Flax linen modules: drop-ins for the classes of the same names in `flax.linen`.

Each inherits from Flax's class and replaces `__call__`. Arguments, variables and initialization are
Flax's, so checkpoints load in both directions and `isinstance` holds. The modules own variables and
do no arithmetic. `DynamicErf`, `DynamicTanh`, `FilterResponseNorm` and `GlobalResponseNorm` are not
in Flax; their arguments are in its manner.

`use_fast_variance` and `force_float32_reductions` are accepted but ignored: statistics are always
accurate, and in float32 or better. The latter still decides the dtype of running statistics. A
`mask` is the `where` of the functions. With a `scale_offset`, the initial scale is 1 - scale_offset
where `scale_init` is Flax's default, `initializers.ones`.

WeightNorm and SpectralNorm never write into the layer that they wrap. StandardizedDense and
StandardizedConv are Flax's Dense and Conv with standardized kernels. `audit` finds what is wrong
with batch norms.
"""

from jaxnorm.linen.add import AddLayerNorm, AddRMSNorm
from jaxnorm.linen.audit import audit
from jaxnorm.linen.more_norms import (
    DynamicErf,
    DynamicTanh,
    FilterResponseNorm,
    GlobalResponseNorm,
)
from jaxnorm.linen.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.linen.recalibrate import recalibrate
from jaxnorm.linen.replaced import replaced
from jaxnorm.linen.weights import (
    SpectralNorm,
    StandardizedConv,
    StandardizedDense,
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
    "StandardizedDense",
    "WeightNorm",
    "audit",
    "plot_audit",
    "recalibrate",
    "replaced",
]
