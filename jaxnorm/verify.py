"""python -m jaxnorm.verify: is the kernel right, and faster than XLA, on the device at hand?

Each case runs by the kernel and by XLA. Results are compared with NumPy in float64, in units of
float32: an error of 1 is the distance to the next float32 of the largest result, or of what it is
the sum or difference of. Times are medians of interleaved rounds; a rate is the least that must be
moved, over the time, over the rate of a copy of the same array.

By default it takes up to two minutes and 1 GB: no case is started that may end later, and those
that are timed are small. `--full` runs all cases, and times arrays that no cache holds.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from jaxnorm import kernels

LIMIT = 4.0  # units: rounding of the mean, of rstd, and of the operations of the formula
RESULTS = ("y", "sum", "dx", "dscale", "dbias")
ROUNDS, CALLS = 7, 10
ROUND_SECONDS = 0.05  # longer calls are fewer
SECONDS = 110.0  # without --full; the rest of two minutes is for what starts before
MEGABYTES, FULL_MEGABYTES = 4, 256  # of x, when timed


class Case(NamedTuple):
    """A norm of rows of k elements, drawn with a mean and a standard deviation.

    The norms that add a residual get one, and a cotangent of the residual_sum.
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
        """Whether the norm subtracts the mean."""
        return self.norm.endswith("layer")

    @property
    def has_residual(self) -> bool:
        """Whether a residual is added to x."""
        return self.norm.startswith("add")

    @property
    def least(self) -> dict[str, int]:
        """How many arrays of the size of x each pass must read or write."""
        return {"forward": 4, "backward": 4} if self.has_residual else {"forward": 2, "backward": 3}

    def arrays(self) -> tuple[tuple[jax.Array, ...], Any]:
        """The arguments: x, perhaps a residual, scale and bias; and a cotangent of the result."""
        return _drawn(self, jax.random.key(0, impl="rbg"))

    def function(self, implementation: str) -> Callable:
        """The norm of these arguments."""
        norm = functools.partial(
            getattr(jn, f"{self.norm}_norm"), epsilon=self.epsilon, implementation=implementation
        )
        return lambda *given: norm(*given[:-2], jn.NormParams(*given[-2:]))


@functools.partial(jax.jit, static_argnums=0)
def _drawn(case: Case, key: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
    # All at once: a generator of random numbers takes longer to compile than a norm.
    drawn = jax.random.normal(key, (3 * case.rows + 2, case.k), jnp.float32)
    x, dy, residual, scale, bias = jnp.split(drawn, np.cumsum([case.rows] * 3 + [1]))
    x, dy, residual = (a.astype(case.dtype) for a in (case.mean + case.std * x, dy, residual))
    given = (x, *((residual,) if case.has_residual else ()), 1 + scale[0], bias[0])
    return given, (dy, dy) if case.has_residual else dy


def right_cases() -> Iterator[Case]:
    """Data that is hard for a norm, in shapes that are hard for a kernel."""
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
    """Rows of many lengths; x has so many MiB."""
    for k in (768, 4096, 1024, 2048, 5120, 8192):
        for dtype in ("bfloat16", "float32"):
            for norm in ("layer", "rms", *(("add_layer", "add_rms") if k in (768, 4096) else ())):
                rows = (megabytes << 20) // (k * jnp.dtype(dtype).itemsize)
                yield Case(norm, rows // 8 * 8, k, dtype)


def truth(case: Case, given: Any, cotangent: Any) -> dict[str, tuple[np.ndarray, Any]]:
    """The results in float64, and of each the size of what it is a sum or difference of."""
    wide = lambda a: np.asarray(a.astype(jnp.float32), np.float64)
    *summands, scale, bias = map(wide, given)
    dy = wide(cotangent[0] if case.has_residual else cotangent)
    x = np.float32(sum(summands)).astype(np.float64)
    # What the backward pass keeps is the residual sum as it is returned.
    residual_sum = wide(jnp.asarray(x, jnp.float32).astype(case.dtype))
    mean = lambda a: a.mean(-1, keepdims=True)
    middle = mean(x) if case.centred else 0
    padded = mean((x - middle) ** 2) + case.epsilon
    rstd = np.where(padded > 0, 1 / np.sqrt(np.where(padded > 0, padded, 1)), 0)
    y, h, g = (x - middle) * rstd * scale + bias, (residual_sum - middle) * rstd, dy * scale
    dx = rstd * (g - h * mean(g * h) - (mean(g) if case.centred else 0))
    dx += dy if case.has_residual else 0
    along = lambda a: np.sqrt((a**2).sum(0)).max()
    return {
        "y": (y, np.abs(y - bias).max()),
        "sum": (residual_sum, 0),
        "dx": (dx, np.abs(rstd * g).max()),
        "dscale": ((dy * h).sum(0), along(dy * h)),
        "dbias": (dy.sum(0), along(dy)),
    }


def errors(case: Case, implementation: str) -> dict[str, float]:
    """Of each result, in units of float32 that the rounding of bfloat16 leaves."""
    given, cotangent = case.arrays()

    @jax.jit
    def results(given, cotangent):
        result, pullback = jax.vjp(case.function(implementation), *given)
        y, *residual_sum = jax.tree.leaves(result)
        dx, *dresidual, dscale, dbias = pullback(cotangent)
        found = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
        if residual_sum:  # the residual's gradient is that of x, to the bit
            found["sum"] = residual_sum[0]
            found["dx"] = jnp.where(dx == dresidual[0], dx, jnp.nan)
        return found

    units, right = {}, truth(case, given, cotangent)
    for name, a in results(given, cotangent).items():
        expected, size = right[name]
        size = max(size, np.abs(expected).max(), np.finfo(np.float32).tiny)
        # Rounding to the dtype of the result is no error.
        rounding = 0.0 if a.dtype == jnp.float32 else 0.51 * float(jnp.finfo(a.dtype).eps)
        error = np.abs(np.asarray(a.astype(jnp.float32), np.float64) - expected).max() / size
        units[name] = np.maximum(0.0, error - rounding) / float(np.finfo(np.float32).eps)
    return units


def programs(case: Case, implementation: str) -> dict[str, Callable]:
    """The forward pass as training runs it, and the backward pass; ready to be called."""
    given, cotangent = case.arrays()
    function = case.function(implementation)

    @jax.jit
    def forward(*given):
        result, pullback = jax.vjp(function, *given)
        others = (*given, *jax.tree.leaves(result))  # what is returned twice would be copied
        return result, [a for a in jax.tree.leaves(pullback) if not any(a is b for b in others)]

    pullback = jax.jit(lambda *given: jax.vjp(function, *given)[1])(*given)
    backward = jax.jit(lambda pullback, cotangent: pullback(cotangent))
    return {"forward": lambda: forward(*given), "backward": lambda: backward(pullback, cotangent)}


def medians(calls: dict[str, Callable]) -> dict[str, float]:
    """Seconds of a call of each; short calls are queued, as in training."""

    def timed(call, count):
        start, results = time.perf_counter(), None
        for _ in range(count):
            results = call()
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / count

    counts, seconds = {}, {name: [] for name in calls}
    for name, call in calls.items():
        jax.block_until_ready(call())
        counts[name] = round(min(CALLS, max(1, ROUND_SECONDS / timed(call, 1))))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            seconds[name].append(timed(call, counts[name]))
    return {name: statistics.median(each) for name, each in seconds.items()}


def times(case: Case) -> dict[str, float]:
    """Seconds of the kernel and of XLA, forward and backward, and of a copy."""
    (x, *_), _ = case.arrays()
    copy = jax.jit(jnp.negative)
    calls = {"copy": lambda: copy(x)}
    for implementation in ("kernel", "xla"):
        for name, call in programs(case, implementation).items():
            calls[f"{implementation} {name}"] = call
    return medians(calls)


def report(case: Case) -> tuple[str, bool]:
    """A line about a case, and whether the kernel is as right as it must be."""
    found, xla = errors(case, "kernel"), max(errors(case, "xla").values())
    numbers = " ".join(f"{found[name]:6.2f}" if name in found else " " * 6 for name in RESULTS)
    return f"{case!s:<54} {numbers}   {xla:8.2f}", all(e <= LIMIT for e in found.values())


def speed(case: Case) -> tuple[str, list[float]]:
    """A line about a case, and how many times as fast as XLA the kernel is."""
    t = times(case)
    size = case.rows * case.k * jnp.dtype(case.dtype).itemsize
    line, gains = f"{case!s:<44}", []
    for name, moved in case.least.items():
        kernel, xla = t[f"kernel {name}"], t[f"xla {name}"]
        share = moved / 2 * t["copy"] / kernel
        line += f"  {name} {kernel * 1e6:7.0f} µs {share:5.0%} of a copy, {xla / kernel:4.2f} x XLA"
        gains.append(xla / kernel)
    return f"{line}  (copy {2 * size / t['copy'] / 1e9:.0f} GB/s)", gains


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.verify",
        description="Is the kernel right, and faster than XLA, on the device at hand?",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--full", action="store_true", help="run all cases, however long it takes")
    sizes = f"of x, when timed; default: {MEGABYTES}, with --full {FULL_MEGABYTES}"
    add("--megabytes", type=int, metavar="N", help=sizes)
    options = parser.parse_args(argv)
    megabytes = options.megabytes
    if megabytes is None:
        megabytes = FULL_MEGABYTES if options.full else MEGABYTES
    if megabytes < 1:
        print(f"--megabytes must be at least 1, got {megabytes}.", file=sys.stderr)
        return 2
    started = time.monotonic()
    backend = jax.default_backend()
    try:
        status = jn.implementations()[backend]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    kernel = kernels.KERNELS.get("cuda" if backend == "gpu" else backend)
    if kernel is None or kernel.unavailable_reason():
        why = kernel.unavailable_reason() if kernel else "there is none for it"
        print(f"{backend}: no kernel to verify, {why}.", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {status}")
    if options.full:
        print("All cases: many minutes, and some 30 times the memory of x.", flush=True)
    else:
        print("Up to two minutes and 1 GB; --full runs all cases, of larger arrays.", flush=True)
    try:
        return verify(megabytes, math.inf if options.full else started + SECONDS)
    except KeyboardInterrupt:
        print("Interrupted: what stands above is all that was verified.", file=sys.stderr)
        return 130


def verify(megabytes: int, deadline: float) -> int:
    """Print what was found; 0 if the kernel is right, 1 if it is not, 2 if no case was run.

    The errors get half of the time until the deadline.
    """
    middle = (time.monotonic() + deadline) / 2
    print(
        f"\nErrors in units of float32, at most {LIMIT:g}. On the right the largest of XLA, which"
    )
    print("adds up the gradients of x in bfloat16 where x is:")
    print(f"{'':<64} {' '.join(f'{name:>6}' for name in RESULTS)}   {'XLA':>8}")
    right = list(_told(right_cases(), report, middle))
    print("\nTimes:")
    gains = [gain for pair in _told(fast_cases(megabytes), speed, deadline) for gain in pair]
    if not right or not gains:
        print("\nThe kernel declined all cases: nothing was verified.")
        return 2
    verdict = "within the limit" if all(right) else "NOT within the limit"
    gain, slower = statistics.geometric_mean(gains), sum(each < 1 for each in gains)
    print(
        f"\nThe kernel's errors are {verdict} in {len(right)} cases. It is {gain:.2f} times as fast"
    )
    print(f"as XLA (geometric mean), and slower in {slower} of {len(gains)} programs.")
    return 0 if all(right) else 1


def _told(cases: Iterator[Case], tell: Callable, deadline: float) -> Iterator[Any]:
    """Print a line for each case; yield what else `tell` returns.

    No case is started that would end after the deadline if it took as long as the longest before.
    """
    todo, longest = list(cases), 0.0
    for number, case in enumerate(todo):
        start = time.monotonic()
        if start + longest > deadline:
            print(f"{len(todo) - number} more cases were not run: pass --full.", flush=True)
            return
        print(f"{number + 1:>2} of {len(todo)}  ", end="", flush=True)
        try:
            line, result = tell(case)
        except jn.KernelUnavailableError as error:
            print(f"{case!s:<54} declined: {error.reason}", flush=True)
        else:
            print(line, flush=True)
            yield result
        longest = max(longest, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
