"""All functions of JAX and Flax that jaxnorm uses beyond their stable interfaces, and why.

Only this file uses them, so only this file must change if JAX or Flax renames them. If a property
can't be read any more, the functions below assume the case that is safe: arrays are sharded, and a
program is exported.

Flax is imported when a module is called, because `import jaxnorm` does not need it.
"""

from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import (
    ClosedJaxpr,  # Taylor mode expands the jaxprs of the primitives below
    Primitive,  # a norm is a primitive, so that its lowering can choose a kernel
    jaxpr_as_fun,
    set_current_trace,
)
from jax.extend.core.primitives import cond_p, reduce_or_p, reduce_precision_p, remat_p
from jax.interpreters.ad import (  # the derivatives of that primitive
    Zero,
    add_tangents,
    instantiate_zeros,
    is_undefined_primal,
    primitive_jvps,
    primitive_transposes,
    zeros_like_aval,
)
from jax.interpreters.batching import primitive_batchers  # its rule for `vmap`
from jax.interpreters.mlir import (  # its lowering for each platform
    LoweringRuleContext,
    lower_fun,
    register_lowering,
)
from jax.lax import optimization_barrier_p

try:
    from jax.experimental import jet
except ImportError:  # it is experimental, and norms work without it
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
    """Return the number of devices of the program that is lowered, or None if it is unknown.

    With several devices, XLA would gather sharded arrays to call a kernel.
    """
    axes: Any = getattr(getattr(ctx, "module_context", None), "axis_context", None)
    mesh = getattr(axes, "mesh", None)
    if mesh is None:  # jit
        return getattr(axes, "num_devices", None)
    if getattr(axes, "manual_axes", None) == frozenset(mesh.axis_names):
        return 1  # in shard_map, where each device has its own arrays
    return getattr(mesh, "size", None)


def is_exported(ctx: LoweringRuleContext) -> bool:
    """Return whether the program is exported, and may run where jaxnorm's kernels are missing."""
    module = getattr(ctx, "module_context", None)
    parameters: Any = getattr(module, "lowering_parameters", None)
    return getattr(parameters, "for_export", True)


def is_sharded(x: jax.Array, axis: int) -> bool:
    """Return whether an explicit mesh divides the axis; to slice or split it would move x."""
    sharding: Any = getattr(jax.typeof(x), "sharding", None)
    return not hasattr(sharding, "spec") or bool(sharding.spec[axis])


def explicit_sharding(x: jax.Array) -> Any:
    """Return the sharding of x over an explicit mesh, or None if no axis is divided."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    return sharding if sharding and any(sharding.spec) else None


def manual_axis_type(x: jax.Array) -> Any:
    """Return the axes of `shard_map` along which x may differ, for the type of kernel results."""
    return jax.typeof(x).manual_axis_type


def varying_axes(x: jax.Array) -> frozenset:
    """Return these axes as a set, which must be the same for all operands of a primitive."""
    return manual_axis_type(x).varying


if TYPE_CHECKING:
    from flax.linen.dtypes import canonicalize_dtype
    from flax.nnx.module import first_from
else:

    def canonicalize_dtype(*args, **options):
        """Return the dtype in which Flax computes, from arrays and the module's `dtype`."""
        from flax.linen.dtypes import canonicalize_dtype

        return canonicalize_dtype(*args, **options)

    def first_from(*args, **options):
        """Return the first argument that is not None, or raise Flax's error."""
        from flax.nnx.module import first_from

        return first_from(*args, **options)
