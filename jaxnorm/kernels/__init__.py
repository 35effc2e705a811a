"""Kernels: arrays in, arrays out, one for each platform that has one; each may decline.

Who computes a norm is chosen by `implementation`, an argument of the functions:

    "xla"       the formulas, which XLA compiles for any platform
    "kernel"    the platform's kernel; an error where there is none, or where it declines
    None        what the environment variable JAXNORM_IMPLEMENTATION says; unset, the kernel where
                it can, else the formulas

What JAX derives from a norm is not refused: forward mode, second derivatives, and vmap over the
parameters are computed by the formulas, whatever computes the norm.
"""

import os
from typing import Any, NoReturn

import jax
from jax.interpreters import mlir

from jaxnorm.kernels import cpu

VARIABLE = "JAXNORM_IMPLEMENTATION"
CHOICES = ("xla", "kernel")


def implementations() -> dict[str, str]:
    """What computes the norms on each platform, and why.

    Examples:
      >>> import jaxnorm as jn
      >>> sorted(jn.implementations())
      ['cpu', 'gpu', 'tpu']
    """
    wanted, missing = check_implementation(None), cpu.missing()
    if wanted == "xla":
        here = f"xla: {VARIABLE}=xla"
    elif missing and wanted == "kernel":
        here = f"none: {VARIABLE} asks for the kernel, but {missing}"
    else:
        here = f"xla: {missing}" if missing else f"kernel: {cpu.level()}"
    return {"cpu": here, "gpu": "xla: there is no kernel", "tpu": "xla: there is no kernel"}


def choose(
    implementation: str | None, how: Any, dtype: Any, x: jax.Array, where: Any
) -> str | None:
    """The implementation that is asked for, "xla" where no kernel takes these, or None for any.

    Raises:
      ValueError: it is not one of those, or a kernel is asked for and none takes these.
    """
    wanted = check_implementation(implementation)
    if wanted == "xla":
        return wanted
    reason = cpu.missing() or cpu.declines(how, dtype, x, where)
    if reason and wanted == "kernel":
        refuse(reason)
    return "xla" if reason else wanted


def check_implementation(implementation: str | None) -> str | None:
    """What the argument says, or else the variable.

    Raises:
      ValueError: it is not one of the choices.
    """
    source = "implementation"
    if implementation is None:
        implementation, source = os.environ.get(VARIABLE) or None, VARIABLE
    if implementation not in (None, *CHOICES):
        raise ValueError(
            f"{source} must be 'xla', 'kernel' or not be given, got {implementation!r}; "
            "see jaxnorm.implementations() for what there is."
        )
    return implementation


def why_not_in(ctx: mlir.LoweringRuleContext) -> str | None:
    """Why no kernel can be called in the program that is being compiled."""
    module = ctx.module_context
    if module.lowering_parameters.for_export:
        return "an exported program must run where jaxnorm's kernels are not built"
    axes: Any = module.axis_context
    # Under jit there are devices; in shard_map a mesh, of which each device may run its own.
    manual = getattr(axes, "manual_axes", frozenset())
    devices = getattr(axes, "num_devices", 1)
    split = manual != frozenset(axes.mesh.axis_names) if manual else devices > 1
    if split:
        return (
            "XLA would gather what is sharded over devices to call it; map over the devices with "
            "jax.shard_map"
        )
    return None


def refuse(reason: str) -> NoReturn:
    """Raise that the kernel that was asked for can't run."""
    raise ValueError(
        f"implementation='kernel' must be given what a kernel takes, but {reason}; pass "
        f"implementation='xla' there, or unset {VARIABLE} if it was that."
    )


# Once and early, so that programs that were compiled and stored before find it.
cpu.missing()
