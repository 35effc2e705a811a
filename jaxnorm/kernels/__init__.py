"""Kernels: plain arrays and numbers in, arrays out; at most one for each platform.

A kernel folder imports nothing of `core`. It says whether it is there (`unavailable_reason`), which
inputs it does not support (`unsupported_reason`), and computes two operations (`forward`, `vjp`).
The table `KERNELS` holds the kernels by platform; it is all that the core sees of them.

The argument `implementation` of the functions chooses what computes a norm:

    "xla"       the formulas, which XLA compiles for any platform
    "kernel"    the platform's kernel; an error if there is none, or if it declines
    None        the environment variable JAXNORM_IMPLEMENTATION if set, else the kernel if it
                supports the input and was proven on such hardware, else XLA

A kernel is proven where it was run on a real chip, right and faster than XLA. Elsewhere it has to
be asked for.

What the kernel supports is decided twice. The call is traced with the formula alone if no platform
has a kernel for it. Otherwise each platform decides when the program is lowered for it, so one
traced program may run by a kernel on one platform and by the formula on another. Which devices
there are is looked up only when a program is lowered: to trace a call must not start JAX's
backends, because `jax.distributed.initialize` has to come first.

The formulas always compute forward mode, second derivatives, and `vmap` over the parameters; asking
for a kernel does not make them an error.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import jax

from jaxnorm._internals import LoweringRuleContext, devices_of, is_exported
from jaxnorm.kernels import cpu, gpu
from jaxnorm.kernels.request import Request

VARIABLE = "JAXNORM_IMPLEMENTATION"
CHOICES = ("xla", "kernel")


class KernelUnavailableError(ValueError):
    """Raised where `implementation="kernel"` is given and no kernel can compute the call.

    Attributes:
      reason: why, for example "it takes no mask".

    Examples:
      >>> import jax.numpy as jnp, jaxnorm as jn
      >>> x = jnp.ones((2, 3))
      >>> try:
      ...     jn.layer_norm(x, where=x > 0, implementation="kernel")
      ... except jn.KernelUnavailableError as error:
      ...     "it takes no mask" in error.reason
      True
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return (
            "implementation='kernel' must be given inputs that the kernel supports, but "
            f"{self.reason}; pass implementation='xla', or unset {VARIABLE} if it was that."
        )


class Kernel(Protocol):
    """What the kernel of a platform provides; a module, or any object with these functions.

    x may have any shape; in memory it is the block (n, s, g, k): n independent examples, s
    positions, g groups of k features. (It is not reshaped to that, because XLA may copy an array to
    add axes of size one.) Statistics are shared over s and k; they have shape (n, g) and are
    float32. Scale and bias have shape (g * k,), or are None; or x is `batch` such blocks, and they
    have shape (batch, g * k).
    """

    def unavailable_reason(self) -> str | None:
        """Why there is no kernel here, or None if there is one."""
        ...

    def target(self) -> str:
        """What hardware it is compiled for."""
        ...

    def opt_in_reason(self) -> str | None:
        """Why it has to be asked for here, or None if it is used unasked.

        It may look at the devices: it is called when a program is lowered, never while a call is
        traced.
        """
        ...

    def unsupported_reason(self, request: Request) -> str | None:
        """Why it does not support such a call, or None if it does."""
        ...

    def forward(
        self,
        x: jax.Array,
        residual: jax.Array | None,
        scale: jax.Array | None,
        bias: jax.Array | None,
        *,
        block: tuple[int, int, int, int],
        batch: int,
        epsilon: float,
        subtract_mean: bool,
    ) -> tuple[
        jax.Array, jax.Array | None, jax.Array | None, jax.Array | None, jax.Array, jax.Array
    ]:
        """y, the sum, the mean's high and low part, variance and rstd.

        A residual has the shape and dtype of x. It is added in float32, and this sum is normalized;
        it is returned in the dtype of x, or None without a residual. The parts of the mean are None
        if it is not subtracted.
        """
        ...

    def vjp(
        self,
        x: jax.Array,
        dy: jax.Array,
        d_residual_sum: jax.Array | None,
        scale: jax.Array | None,
        mean_high: jax.Array | None,
        mean_low: jax.Array | None,
        rstd: jax.Array,
        *,
        block: tuple[int, int, int, int],
        batch: int,
        wanted: tuple[bool, ...],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """The gradients of x, and of scale and bias where they are `wanted`.

        Where x is the sum with a residual, `d_residual_sum` is the cotangent of that sum; it is
        added to the gradient of x in float32.

        x and dy hold `batch` such blocks, and the statistics have shape (batch, n, g). Each block
        has its own gradients of scale and bias: they have shape (batch, g * k) and are float32.
        """
        ...


PLATFORMS = ("cpu", "tpu", "cuda")  # that may have one
# Read-only: programs that are compiled depend on it, and JAX would find them after a change.
KERNELS: Mapping[str, Kernel] = MappingProxyType({"cpu": cpu, "cuda": gpu})


def implementations() -> dict[str, str]:
    """What computes the norms on each platform, and why.

    This looks for devices, so call it after `jax.distributed.initialize`.

    Returns:
      For each platform "kernel: " and what hardware the kernel is compiled for, or "xla: " or
      "none: " and the reason. "xla: " is also said of a kernel that has to be asked for.

    Examples:
      >>> import jaxnorm as jn
      >>> sorted(jn.implementations())
      ['cpu', 'gpu', 'tpu']
    """
    wanted = check_implementation(None)

    def told(platform: str) -> str:
        if wanted == "xla":
            return f"xla: {VARIABLE}=xla"
        kernel = KERNELS.get(platform)
        reason = kernel.unavailable_reason() if kernel else "there is no kernel"
        if reason and wanted == "kernel":
            return f"none: {VARIABLE} asks for the kernel, but {reason}"
        if kernel and wanted is None:
            reason = reason or kernel.opt_in_reason()
        return f"xla: {reason}" if reason or not kernel else f"kernel: {kernel.target()}"

    return {"cpu": told("cpu"), "gpu": told("cuda"), "tpu": told("tpu")}


def check_implementation(implementation: str | None) -> str | None:
    """The argument if it is given, else the environment variable.

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
    """Whether a kernel of any platform supports the request, on some device.

    Raises:
      KernelUnavailableError: none does, and one is required.
    """
    platforms: dict[str, list[str]] = {}
    for platform, kernel in KERNELS.items():
        reason = kernel.unavailable_reason() or kernel.unsupported_reason(request)
        if reason is None:
            return True
        platforms.setdefault(reason, []).append(platform)
    if required:
        raise KernelUnavailableError(
            "; ".join(f"{reason} ({', '.join(on)})" for reason, on in platforms.items())
        )
    return False


def for_program(
    platform: str | None,
    ctx: LoweringRuleContext,
    request: Request,
    *,
    required: bool,
) -> Kernel | None:
    """The kernel to call in a program that is lowered for the platform, or None for the formula.

    Raises:
      KernelUnavailableError: there is none that supports the request, and one is required.
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
    """Why no kernel can be called in a program over several devices, if that is so."""
    devices = devices_of(ctx)
    if devices is None:
        return f"jax {jax.__version__} does not tell over how many devices arrays are sharded"
    if devices <= 1:
        return None
    return (
        "XLA would gather the arrays that are sharded over devices to call it; map over the "
        "devices with jax.shard_map"
    )


# Early, so that programs which were compiled and stored before find the kernels they call.
for _kernel in KERNELS.values():
    _kernel.unavailable_reason()
