"""Kernels: plain arrays and numbers in, arrays out; at most one for each platform.

A kernel folder imports nothing of `core`. It returns the reason why the kernel is unavailable, if
it is (`unavailable_reason`), and why it does not support a call (`unsupported_reason`), and
computes two operations (`forward`, `vjp`). The table `KERNELS` holds the kernels by platform; core
uses nothing else of them.

The argument `implementation` of the functions chooses what computes a norm:

    "xla"       the formulas, which XLA compiles for any platform
    "kernel"    the platform's kernel; an error if there is none, or if it does not support the call
    None        the environment variable JAXNORM_IMPLEMENTATION if set, else the kernel if it
                supports the call and is the default on this hardware, else XLA

A kernel is the default only where it was run on a real chip, and was right and faster than XLA.
Elsewhere it is used only with `implementation="kernel"`.

Support is checked while a call is traced, and again at lowering. If no platform's kernel supports
the call, only the formula is traced. Otherwise the choice is made for each platform at lowering, so
that one traced program may run a kernel on one platform and the formula on another. Devices are
looked up at lowering only: tracing must not start JAX's backends, because
`jax.distributed.initialize` has to come first.

The formulas always compute forward mode, second derivatives, and `vmap` over the parameters, with
`implementation="kernel"` too.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

import jax

from jaxnorm._internals import LoweringRuleContext, devices_of, is_exported
from jaxnorm.kernels import cpu, gpu
from jaxnorm.kernels.protocol import Kernel
from jaxnorm.kernels.request import Request

VARIABLE = "JAXNORM_IMPLEMENTATION"
CHOICES = ("xla", "kernel")


class KernelUnavailableError(ValueError):
    """Raised if `implementation="kernel"` is given and no kernel can compute the call.

    Attributes:
      reason: why, for example "it does not support masks".

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> x = jnp.ones((2, 3))
      >>> try:
      ...     jn.layer_norm(x, where=x > 0, implementation="kernel")
      ... except jn.KernelUnavailableError as error:
      ...     "it does not support masks" in error.reason
      True
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            "implementation='kernel' must be given inputs that the kernel supports, but "
            f"{self.reason}; pass implementation='xla', or unset {VARIABLE} if that is set."
        )


PLATFORMS = ("cpu", "tpu", "cuda")  # norms are lowered for each of these separately
# Read-only: compiled programs depend on it, and JAX would reuse them after a change.
KERNELS: Mapping[str, Kernel] = MappingProxyType({"cpu": cpu, "cuda": gpu})


def implementations() -> dict[str, str]:
    """Return what computes the norms on each platform, and why.

    This looks up devices, so call it after `jax.distributed.initialize`.

    Returns:
      A text for each platform: "kernel: " and the hardware that the kernel is compiled for, "xla: "
      and the reason why the formulas are the default, or "none: " and the reason why the kernel
      that the environment variable requires can't be used.

    Examples:
      >>> import jaxnorm as jn
      >>> sorted(jn.implementations())
      ['cpu', 'gpu', 'tpu']
    """
    implementation = check_implementation(None)

    def describe(platform: str) -> str:
        if implementation == "xla":
            return f"xla: {VARIABLE}=xla"
        kernel = KERNELS.get(platform)
        reason = kernel.unavailable_reason() if kernel else "there is no kernel"
        if reason and implementation == "kernel":
            return f"none: {VARIABLE} requires the kernel, but {reason}"
        if kernel and implementation is None:
            reason = reason or kernel.opt_in_reason()
        return f"xla: {reason}" if reason or not kernel else f"kernel: {kernel.target()}"

    return {"cpu": describe("cpu"), "gpu": describe("cuda"), "tpu": describe("tpu")}


def check_implementation(implementation: str | None) -> str | None:
    """Return the argument if it is given, else the environment variable.

    Raises:
      ValueError: it is not one of the choices.
    """
    source = "implementation"
    if implementation is None:
        implementation, source = os.environ.get(VARIABLE) or None, VARIABLE
    if implementation not in (None, *CHOICES):
        raise ValueError(
            f"{source} must be 'xla', 'kernel' or not be given, got {implementation!r}; "
            f"set it to one of {', '.join(map(repr, CHOICES))}, or leave it out."
        )
    return implementation


def supported(request: Request, *, required: bool) -> bool:
    """Return whether the kernel of any platform supports the request.

    Raises:
      KernelUnavailableError: no kernel supports it, and one is required.
    """
    platforms: dict[str, list[str]] = {}
    for platform, kernel in KERNELS.items():
        reason = kernel.unavailable_reason() or kernel.unsupported_reason(request)
        if reason is None:
            return True
        platforms.setdefault(reason, []).append(platform)
    if required:
        raise KernelUnavailableError(
            "; ".join(f"{reason} ({', '.join(names)})" for reason, names in platforms.items())
        )
    return False


def for_program(
    platform: str | None,
    ctx: LoweringRuleContext,
    request: Request,
    *,
    required: bool,
) -> Kernel | None:
    """Return the kernel for a program that is lowered for the platform, or None for the formula.

    Raises:
      KernelUnavailableError: no kernel supports the request, and one is required.
    """
    kernel = KERNELS.get(platform or "")
    if kernel is None:
        reason = f"there is no kernel for {platform or 'the platform of this program'}"
    else:
        request = request._replace(exported=is_exported(ctx))
        reason = kernel.unavailable_reason() or kernel.unsupported_reason(request) or _sharded(ctx)
        reason = reason or (None if required else kernel.opt_in_reason())
    if reason and required:
        raise KernelUnavailableError(reason)
    return None if reason else kernel


def _sharded(ctx: LoweringRuleContext) -> str | None:
    """Return why no kernel can be called in a program over several devices, or None."""
    devices = devices_of(ctx)
    if devices is None:
        return f"jax {jax.__version__} does not report over how many devices arrays are sharded"
    if devices <= 1:
        return None
    return (
        "XLA would gather arrays that are sharded over devices to call it; map over the devices "
        "with jax.shard_map"
    )


# On import: this registers the kernels, which programs from JAX's compilation cache may call.
for _kernel in KERNELS.values():
    _kernel.unavailable_reason()
