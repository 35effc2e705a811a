"""The functions that the kernel of a platform provides."""

from typing import Protocol

import jax

from jaxnorm.kernels.request import Request


class Kernel(Protocol):
    """The functions of a platform's kernel, which is a module or any object that has them.

    x may have any shape. In memory it is the block (n, s, g, k): n independent examples, s
    positions, g groups of k features. (x is not reshaped to that, because XLA may copy an array to
    add axes of size one.) Statistics are shared over s and k; they have shape (n, g) and are
    float32. Scale and bias have shape (g * k,), or are None. Or x holds `batch` such blocks, and
    scale and bias have shape (batch, g * k).
    """

    def unavailable_reason(self) -> str | None:
        """Return why the kernel can't be used here, or None if it can."""
        ...

    def target(self) -> str:
        """Return the hardware that the kernel is compiled for."""
        ...

    def opt_in_reason(self) -> str | None:
        """Return why the kernel is not the default here, or None if it is.

        This may look up devices: it is called when a program is lowered, never while a call is
        traced.
        """
        ...

    def unsupported_reason(self, request: Request) -> str | None:
        """Return why the kernel does not support such a call, or None if it does."""
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
        """Return y, the residual sum, the high and low part of the mean, variance and rstd.

        A residual has the shape and dtype of x. x + residual is computed in float32 and normalized;
        the residual sum is this sum in the dtype of x, or None without a residual. The parts of the
        mean are None if it is not subtracted.
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
        """Return the gradients of x, scale and bias; `wanted` is for the last two.

        If x is a residual sum, `d_residual_sum` is the cotangent of that sum; it is added to the
        gradient of x in float32.

        x and dy hold `batch` blocks, and the statistics have shape (batch, n, g). The gradients of
        scale and bias have shape (batch, g * k), one row for each block, and are float32; they are
        None if they are not wanted.
        """
        ...
