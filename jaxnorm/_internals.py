"""All that jaxnorm uses of JAX and Flax beyond their stable interfaces, and what for.

No other file uses any of it. A new version of JAX or Flax may rename these; then mend this file.
What can't be told any more is taken for the case that needs more care: arrays that are sharded, and
a program that is exported.

Flax is imported when a module calls, because `import jaxnorm` does without it.
"""

from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import (
    ClosedJaxpr,  # Taylor mode expands those of the primitives below
    Primitive,  # a norm is one, so that its lowering can choose a kernel
    jaxpr_as_fun,
    set_current_trace,
)
from jax.extend.core.primitives import cond_p, reduce_or_p, reduce_precision_p, remat_p
from jax.interpreters.ad import (  # its derivatives
    Zero,
    add_tangents,
    instantiate_zeros,
    is_undefined_primal,
    primitive_jvps,
    primitive_transposes,
    zeros_like_aval,
)
from jax.interpreters.batching import primitive_batchers  # what `vmap` makes of it
from jax.interpreters.mlir import (  # its lowering for each platform
    LoweringRuleContext,
    lower_fun,
    register_lowering,
)
from jax.lax import optimization_barrier_p

try:
    from jax.experimental import jet
except ImportError:  # it is experimental, and norms do without it
    jet: Any = None
if not all(hasattr(jet, name) for name in ("JetTrace", "jet2", "jet_rules", "zero_prop")):
    jet = None

__all__ = [
    "ClosedJaxpr",
    "LoweringRuleContext",
    "Primitive",
    "Zero",
    "add_tangents",
    "canonicalize_dtype",
    "cond_p",
    "devices_of",
    "explicit_sharding",
    "first_from",
    "instantiate_zeros",
    "is_exported",
    "is_sharded",
    "is_undefined_primal",
    "jaxpr_as_fun",
    "jet",
    "lower_fun",
    "manual_axis_type",
    "optimization_barrier_p",
    "primitive_batchers",
    "primitive_jvps",
    "primitive_transposes",
    "reduce_or_p",
    "reduce_precision_p",
    "register_lowering",
    "remat_p",
    "set_current_trace",
    "varying_axes",
    "zeros_like_aval",
]


def devices_of(ctx: LoweringRuleContext) -> int | None:
    """Over how many devices XLA divides the arrays that a lowering rule has; None if unknown.

    XLA would gather such arrays to call a kernel.
    """
    axes: Any = getattr(getattr(ctx, "module_context", None), "axis_context", None)
    mesh = getattr(axes, "mesh", None)
    if mesh is None:  # jit
        return getattr(axes, "num_devices", None)
    if getattr(axes, "manual_axes", None) == frozenset(mesh.axis_names):
        return 1  # in shard_map, where each device has arrays of its own
    return getattr(mesh, "size", None)


def is_exported(ctx: LoweringRuleContext) -> bool:
    """Whether the program may run where jaxnorm is not installed, which has its kernels."""
    module = getattr(ctx, "module_context", None)
    parameters: Any = getattr(module, "lowering_parameters", None)
    return getattr(parameters, "for_export", True)


def is_sharded(x: jax.Array, axis: int) -> bool:
    """Whether an explicit mesh divides the axis; to slice or split it would move x."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None)
    return not hasattr(sharding, "spec") or bool(sharding.spec[axis])


def explicit_sharding(x: jax.Array) -> Any:
    """How an explicit mesh divides the axes of x, or None if it divides none."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if sharding and any(sharding.spec) else None


def manual_axis_type(x: jax.Array) -> Any:
    """Along which axes of `shard_map` x may differ, for the type of what a kernel makes of it."""
    return jax.typeof(x).manual_axis_type


def varying_axes(x: jax.Array) -> frozenset:
    """The same axes as a set: a primitive's operands must have the same."""
    return manual_axis_type(x).varying


if TYPE_CHECKING:
    from flax.linen.dtypes import canonicalize_dtype
    from flax.nnx.module import first_from
else:

    def canonicalize_dtype(*args, **options):
        """The dtype in which Flax's modules compute, of arrays and the module's `dtype`."""
        from flax.linen.dtypes import canonicalize_dtype

        return canonicalize_dtype(*args, **options)

    def first_from(*args, **options):
        """What Flax takes of the arguments of a call and of the constructor, or its error."""
        from flax.nnx.module import first_from

        return first_from(*args, **options)
