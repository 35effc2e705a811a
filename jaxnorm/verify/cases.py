"""The cases that are verified, and their arrays."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn


class Case(NamedTuple):
    """A norm of rows of k elements, which are random with a mean and a standard deviation.

    Norms of a residual sum also get a residual, and a cotangent of the sum.
    """

    norm: str
    rows: int
    k: int
    dtype: str
    mean: float = 0.0
    std: float = 1.0
    epsilon: float = 1e-6

    def __str__(self) -> str:
        data = f", {self.mean:g} ± {self.std:g}" if (self.mean, self.std) != (0, 1) else ""
        return f"{self.norm}_norm {self.rows} x {self.k} {self.dtype}{data}"

    @property
    def centred(self) -> bool:
        """Return whether the norm subtracts the mean."""
        return self.norm.endswith("layer")

    @property
    def has_residual(self) -> bool:
        """Return whether a residual is added to x."""
        return self.norm.startswith("add")

    @property
    def min_arrays(self) -> dict[str, int]:
        """Return the number of arrays of the size of x that each pass must read or write."""
        return {"forward": 4, "backward": 4} if self.has_residual else {"forward": 2, "backward": 3}

    def arrays(self) -> tuple[tuple[jax.Array, ...], Any]:
        """Return x, a residual if there is one, scale and bias; and a cotangent of the result."""
        return _draw(self, jax.random.key(0, impl="rbg"))

    def function(self, implementation: str) -> Callable:
        """Return the norm as a function of these arguments."""
        norm = functools.partial(
            getattr(jn, f"{self.norm}_norm"), epsilon=self.epsilon, implementation=implementation
        )
        return lambda *args: norm(*args[:-2], jn.NormParams(*args[-2:]))


@functools.partial(jax.jit, static_argnums=0)
def _draw(case: Case, key: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
    # In one call, because random numbers take longer to compile than a norm.
    normal = jax.random.normal(key, (3 * case.rows + 2, case.k), jnp.float32)
    x, dy, residual, scale, bias = jnp.split(normal, np.cumsum([case.rows] * 3 + [1]))
    x, dy, residual = (a.astype(case.dtype) for a in (case.mean + case.std * x, dy, residual))
    args = (x, *((residual,) if case.has_residual else ()), 1 + scale[0], bias[0])
    return args, (dy, dy) if case.has_residual else dy


def right_cases() -> Iterator[Case]:
    """Yield cases for accuracy: data hard for a norm, in shapes hard for a kernel."""
    norms = ("layer", "rms")
    for dtype in ("bfloat16", "float32"):
        for norm in norms:
            yield Case(norm, 4096, 768, dtype, mean=1.0)
            yield Case(f"add_{norm}", 4096, 768, dtype, mean=1.0)
    for norm in norms:
        yield Case(norm, 64, 2048, "float32", mean=1e4)
        yield Case(f"add_{norm}", 96, 1024, "float32", mean=1e4)
        yield Case(norm, 64, 2048, "float32", std=1e18, epsilon=0.0)
        yield Case(norm, 64, 2048, "float32", std=1e-15, epsilon=0.0)
        yield Case(norm, 64, 2048, "float32", mean=3.0, std=0.0)
    for rows, k in ((64, 128), (7, 768), (1, 4096), (1000, 1024), (96, 8192), (5, 1000)):
        for norm in norms:
            yield Case(norm, rows, k, "float32")


def fast_cases(megabytes: int) -> Iterator[Case]:
    """Yield cases for times: rows of many lengths, with an x of that size."""
    for k in (768, 4096, 1024, 2048, 5120, 8192):
        for dtype in ("bfloat16", "float32"):
            for norm in ("layer", "rms", *(("add_layer", "add_rms") if k in (768, 4096) else ())):
                rows = (megabytes << 20) // (k * jnp.dtype(dtype).itemsize)
                yield Case(norm, rows // 8 * 8, k, dtype)
