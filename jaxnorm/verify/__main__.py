"""The command line of `python -m jaxnorm.verify`."""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn
from jaxnorm import kernels
from jaxnorm.verify.accuracy import errors
from jaxnorm.verify.cases import Case, fast_cases, right_cases
from jaxnorm.verify.times import times

LIMIT = 4.0  # units: rounding of the mean, of rstd, and of the operations of the formula
RESULTS = ("y", "sum", "dx", "dscale", "dbias")
SECONDS = 110.0  # without --full; the rest of two minutes is for the start of the program
MEGABYTES, FULL_MEGABYTES = 4, 256  # the size of x when timed


def report(case: Case) -> tuple[str, bool]:
    """Return a line about the errors of a case, and whether the kernel is within the limit."""
    units, xla = errors(case, "kernel"), max(errors(case, "xla").values())
    numbers = " ".join(f"{units[name]:6.2f}" if name in units else " " * 6 for name in RESULTS)
    return f"{case!s:<54} {numbers}   {xla:8.2f}", all(e <= LIMIT for e in units.values())


def speed(case: Case) -> tuple[str, list[float]]:
    """Return a line about the times of a case, and the speed of the kernel over that of XLA."""
    t = times(case)
    size = case.rows * case.k * jnp.dtype(case.dtype).itemsize
    line, gains = f"{case!s:<44}", []
    for name, moved in case.min_arrays.items():
        kernel, xla = t[f"kernel {name}"], t[f"xla {name}"]
        share = moved / 2 * t["copy"] / kernel
        line += f"  {name} {kernel * 1e6:7.0f} µs {share:5.0%} of a copy, {xla / kernel:4.2f} x XLA"
        gains.append(xla / kernel)
    return f"{line}  (copy {2 * size / t['copy'] / 1e9:.0f} GB/s)", gains


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxnorm.verify",
        description="Check that the kernel is right, and faster than XLA, on this device.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--full", action="store_true", help="run all cases, however long it takes")
    sizes = f"MiB of x when timed; default: {MEGABYTES}, with --full {FULL_MEGABYTES}"
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
        reason = kernel.unavailable_reason() if kernel else "there is none for this platform"
        print(f"{backend}: no kernel to verify, {reason}.", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {status}")
    if options.full:
        print("All cases: many minutes, and some 30 times the memory of x.", flush=True)
    else:
        print("Up to two minutes and 1 GB; --full runs all cases, of larger arrays.", flush=True)
    try:
        return verify(megabytes, math.inf if options.full else started + SECONDS)
    except KeyboardInterrupt:
        print("Interrupted: only the cases above were verified.", file=sys.stderr)
        return 130


def verify(megabytes: int, deadline: float) -> int:
    """Print all results; return 0 if the kernel is right, 1 if it is not, 2 if no case was run.

    The cases for accuracy get half of the time until the deadline.
    """
    half_time = (time.monotonic() + deadline) / 2
    print(
        f"\nErrors in units of float32; the limit is {LIMIT:g}. The last column is the largest of"
    )
    print("XLA, which sums the gradients of x in bfloat16 if x is bfloat16:")
    print(f"{'':<64} {' '.join(f'{name:>6}' for name in RESULTS)}   {'XLA':>8}")
    right = list(_run_cases(right_cases(), report, half_time))
    print("\nTimes:")
    gains = [gain for pair in _run_cases(fast_cases(megabytes), speed, deadline) for gain in pair]
    if not right or not gains:
        print("\nThe kernel supports none of the cases: nothing was verified.")
        return 2
    verdict = "within the limit" if all(right) else "NOT within the limit"
    gain, slower = statistics.geometric_mean(gains), sum(each < 1 for each in gains)
    print(
        f"\nThe kernel's errors are {verdict} in {len(right)} cases. It is {gain:.2f} times as fast"
    )
    print(f"as XLA (geometric mean), and slower in {slower} of {len(gains)} programs.")
    return 0 if all(right) else 1


def _run_cases(cases: Iterator[Case], run: Callable, deadline: float) -> Iterator[Any]:
    """Print the line that `run` returns for each case, and yield its other result.

    Stop before the deadline: assume that a case takes as long as the longest one so far.
    """
    remaining, longest = list(cases), 0.0
    for number, case in enumerate(remaining):
        start = time.monotonic()
        if start + longest > deadline:
            print(f"{len(remaining) - number} more cases were not run: pass --full.", flush=True)
            return
        print(f"{number + 1:>2} of {len(remaining)}  ", end="", flush=True)
        try:
            line, result = run(case)
        except jn.KernelUnavailableError as error:
            print(f"{case!s:<54} not supported: {error.reason}", flush=True)
        else:
            print(line, flush=True)
            yield result
        longest = max(longest, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
