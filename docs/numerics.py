"""The error of layer and batch norm in float32 units, compared with Flax and PyTorch.

    python docs/numerics.py            prints the tables
    python docs/numerics.py --write    also writes them to docs/numerics.md

It takes about a minute on two CPU cores. PyTorch is skipped if it is not installed.
"""

import argparse
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxnorm as jn
from jaxnorm.kernels import cpu

EPSILON = 1e-5
UNIT = float(np.finfo(np.float32).eps)
HERE = Path(__file__).parent


def rows(mean: float, std: float, features: int = 1024) -> Callable:
    """Normal random numbers: `features` of them for each statistic."""
    return lambda rng, count: mean + std * rng.standard_normal((count, features))


def outliers(rng: np.random.Generator, count: int) -> np.ndarray:
    """Standard normal numbers; one in a thousand is ten thousand times as large."""
    x = rng.standard_normal((count, 1024))
    return np.where(rng.random(x.shape) < 1e-3, 1e4 * x, x)


def constants(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows in which all elements are equal."""
    return np.broadcast_to(10 * rng.standard_normal((count, 1)), (count, 1024))


def counts(rng: np.random.Generator, count: int) -> np.ndarray:
    """Small integers."""
    return rng.poisson(3.0, (count, 1024)).astype(float)


def pattern(value: Callable, noise: float = 1.0, features: int = 1024) -> Callable:
    """Normal random numbers of that size, and a function of the place: 0 is the first, 1 the last.

    A sample of the elements may be far from the mean of all.
    """
    place = np.linspace(0, 1, features)
    return lambda rng, count: value(place) + noise * rng.standard_normal((count, features))


def constant_but_one(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows in which all elements are equal but one."""
    return np.where(np.arange(1024) == rng.integers(1024, size=(count, 1)), 1e4, 7.0)


KINDS: dict[str, Callable] = {
    "mean 0, std 1": rows(0, 1),
    "mean 1e2, std 1": rows(1e2, 1),
    "mean 1e4, std 1": rows(1e4, 1),
    "mean 1e6, std 10": rows(1e6, 10),
    "mean -3e5, std 1": rows(-3e5, 1),
    "outliers": outliers,
    "constants": constants,
    "counts": counts,
    "std 1e-18": rows(0, 1e-18),
    "std 1e18": rows(0, 1e18),
    "first 1/32 at 1e4": pattern(lambda place: 1e4 * (place < 1 / 32), 0),
    "first 1/32 around 1e4": pattern(lambda place: 1e4 * (place < 1 / 32)),
    "zeros first": pattern(lambda place: 1e4 * (place > 1 / 4)),
    "step of 1e4": pattern(lambda place: 1e4 * (place > 1 / 2)),
    "ramp to 1e4": pattern(lambda place: 1e4 * place),
    "constant but one": constant_but_one,
    "rows of 4096, first at 1e6": pattern(lambda place: 1e6 * (place == 0), 1, 4096),
    "rows of 4096, first 32 at 3e3": pattern(lambda place: 3e3 * (place < 1 / 128), 0, 4096),
    "rows of 2^18": rows(1, 1, 2**18),
    "rows of 2^18, mean 1e4": rows(1e4, 1, 2**18),
}


def problem(norm: str, kind: Callable) -> tuple[np.ndarray, ...]:
    """x, scale, bias and dy in float32: rows (layer) or columns (batch) of one kind of data."""
    rng = np.random.default_rng(0)
    x = np.asarray(kind(rng, 2), np.float32)
    if x.shape[1] < 2**18:
        x = np.asarray(kind(rng, 64), np.float32)
    x = x if norm == "layer" else np.ascontiguousarray(x.T)
    scale, bias = rng.standard_normal((2, x.shape[1])).astype(np.float32)
    return x, scale, bias, rng.standard_normal(x.shape).astype(np.float32)


def truth(norm: str, x, scale, bias, dy) -> dict[str, np.ndarray]:
    """Return the output and the gradients, computed in float64."""
    x, scale, bias, dy = (np.asarray(a, np.float64) for a in (x, scale, bias, dy))
    axis = 1 if norm == "layer" else 0
    centred = x - x.mean(axis, keepdims=True)
    centred -= centred.mean(axis, keepdims=True)
    rstd = 1 / np.sqrt((centred**2).mean(axis, keepdims=True) + EPSILON)
    h, g = centred * rstd, dy * scale
    own = g.mean(axis, keepdims=True) + h * (g * h).mean(axis, keepdims=True)
    y, dx = h * scale + bias, rstd * (g - own)
    return {"y": y, "dx": dx, "dscale": (dy * h).sum(0), "dbias": dy.sum(0)}


def with_jax(apply: Callable) -> Callable:
    """Return the output and the gradients of a JAX function of (norm, x, scale, bias)."""

    def run(norm, x, scale, bias, dy):
        @jax.jit
        def both(x, scale, bias, dy):
            y, backward = jax.vjp(lambda *args: apply(norm, *args), x, scale, bias)
            return y, *backward(dy)

        return dict(zip(("y", "dx", "dscale", "dbias"), both(x, scale, bias, dy), strict=True))

    return run


def apply_jaxnorm(implementation, norm, x, scale, bias):
    """jaxnorm, by its CPU kernel or by XLA, else with its defaults."""
    options: Any = {"params": jn.NormParams(scale, bias), "epsilon": EPSILON}
    options["implementation"] = implementation
    if norm == "layer":
        return jn.layer_norm(x, **options)
    return jn.batch_norm(x, jn.init_batch_norm_state(x.shape[1]), **options)[0]


def apply_flax(norm, x, scale, bias):
    """Flax, with its defaults."""
    variables = {"params": {"scale": scale, "bias": bias}}
    if norm == "layer":
        return nn.LayerNorm(epsilon=EPSILON).apply(variables, x)
    zeros = jnp.zeros(x.shape[1])
    variables["batch_stats"] = {"mean": zeros, "var": zeros}
    module = nn.BatchNorm(use_running_average=False, epsilon=EPSILON)
    return module.apply(variables, x, mutable=["batch_stats"])[0]


def run_torch(norm, x, scale, bias, dy):
    """PyTorch in eager mode."""
    import torch  # pyright: ignore[reportMissingImports] (optional)

    x, scale, bias = (torch.tensor(a, requires_grad=True) for a in (x, scale, bias))
    if norm == "layer":
        y = torch.nn.functional.layer_norm(x, x.shape[1:], scale, bias, EPSILON)
    else:
        y = torch.nn.functional.batch_norm(x, None, None, scale, bias, True, eps=EPSILON)
    y.backward(torch.tensor(dy))
    results = y.detach(), x.grad, scale.grad, bias.grad
    return dict(zip(("y", "dx", "dscale", "dbias"), map(np.asarray, results), strict=True))


PEERS = {
    "jaxnorm": with_jax(functools.partial(apply_jaxnorm, "kernel")),
    "jaxnorm (XLA)": with_jax(functools.partial(apply_jaxnorm, "xla")),
    "flax": with_jax(apply_flax),
    "torch": run_torch,
}


def measure(peer: Callable, norm: str, kind: Callable) -> dict[str, float]:
    """Return the largest error of each result, in float32 units of its largest element."""
    arguments = problem(norm, kind)
    right, got = truth(norm, *arguments), peer(norm, *arguments)
    return {name: units(got[name], right[name]) for name in right}


def units(result, right: np.ndarray) -> float:
    """Return the largest error in units of the last place of the largest element."""
    largest = max(np.abs(right).max(), float(np.finfo(np.float32).tiny))
    error = np.abs(np.asarray(result, np.float64) - right).max() / largest / UNIT
    return float("inf") if np.isnan(error) else float(error)


def table(norm: str, peers: dict[str, Callable]) -> list[str]:
    """A Markdown table with the largest errors of y and of the gradients for each kind of data."""
    lines = [
        f"| {'rows' if norm == 'layer' else 'columns'} of | "
        + " | ".join(f"{peer}: y | gradients" for peer in peers)
        + " |",
        "|---" * (1 + 2 * len(peers)) + "|",
    ]
    for name, kind in KINDS.items():
        cells = [name]
        for peer in peers.values():
            errors = measure(peer, norm, kind)
            cells += [f"{errors.pop('y'):.2g}", f"{max(errors.values()):.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description="The error of layer and batch norm in float32 units."
    )
    parser.add_argument("--write", action="store_true", help="write docs/numerics.md too")
    arguments = parser.parse_args()
    peers = dict(PEERS)
    versions = f"jax {jax.__version__}, flax {flax.__version__}"
    if importlib.util.find_spec("torch"):
        import torch  # pyright: ignore[reportMissingImports] (optional)

        versions += f", PyTorch {torch.__version__}"
    else:
        peers.pop("torch")
        print("PyTorch is skipped: it is not installed.", file=sys.stderr)
    page = PAGE.format(
        epsilon=EPSILON,
        kernel=cpu.target(),
        versions=f"{versions}, {platform.machine()}, {jax.default_backend()}",
        layer="\n".join(table("layer", peers)),
        batch="\n".join(table("batch", peers)),
    )
    print(page)
    if arguments.write:
        new = HERE / "numerics.md.new"
        new.write_text(page)
        os.replace(new, HERE / "numerics.md")
    return 0


PAGE = """\
# Accuracy

The error of jaxnorm is at most 4 units on every kind of data in the tables, on all processors.
Where the mean is 10,000 times the standard deviation, Flax loses all digits, and PyTorch about four
of seven (all of them on columns of 2^18 elements).

The tables have the largest error of the output, and of the gradients of x, scale and bias, compared
with NumPy in float64. A unit is the last place of a float32 of the size of the largest exact
element. An error of 1 is about the best that float32 allows. At 8e6 the error is as large as the
largest element, so no digit is correct; larger numbers mean that the result is that much too large.

All libraries get the same input, the same gradient and epsilon {epsilon}, and otherwise use their
defaults. "jaxnorm" is the CPU kernel ({kernel} here), "jaxnorm (XLA)" the formulas that compute the
norms where there is no kernel. Made by `python docs/numerics.py --write` with
{versions}.

## Layer norm: 64 rows of 1024 or 4096 elements (2 of 2^18)

{layer}

## Batch norm: 64 features of 1024 or 4096 elements (2 of 2^18)

{batch}

## Sources of error

**The variance.** Flax computes it as the mean of the squares minus the square of the mean. The two
cancel when the mean is much larger than the standard deviation. PyTorch subtracts the mean first,
rounded to one float32; for rows around 1e4 it is off by up to 5e-4. jaxnorm also computes this
rounding error of the mean, and subtracts it, too.

**The range.** jaxnorm scales before it squares, so 1e18 does not overflow (the CPU kernel
recomputes such data in float64). Its derivative contains no power of the standard deviation that
could overflow. In float32 this holds for numbers up to about 1e19 and, with epsilon 0, down to
about 1e-15. The squares of other numbers leave the range of float32, and the result is zero.

**The sample.** The formulas first subtract the mean of a sample, an eighth of the elements. One
pass over x then gives the distance of this mean from that of all elements, and the variance
([accelerators.md](accelerators.md)). For a sample of k of n elements, the squared distance is at
most n / k - 1 times the variance, for any data. So at most a factor of 8 cancels, which is three of
the 24 bits of a float32. The worst data has 1e4 in exactly the elements of the sample and noise
around 0 in all others: its error is 8 units. All kinds of data in the tables have at most 4; six of
them are hard for a sample.

**Sums.** A float32 sum is rounded at every addition. If the elements are alike, these errors don't
average out after an outlier: each addition to a sum of 1e12 rounds to a multiple of 65536. The
error depends on the vector length of the processor. So on CPUs the formulas take sums of more than
4096 numbers in float64, in the forward pass and, where x is float32, in the backward pass. The CPU
kernel adds about ten numbers of the statistics in float32, sixteen in columns, and the sums of
these in float64. It adds the gradients of columns in float64.

**The bound.** `tests/test_numerics.py` bounds every number in the columns of jaxnorm by 4, on all
processors. On the longest columns the gradient of scale is a sum of 2^18 terms of both signs, and
its error is that of the rounded terms. If the exact value is zero, as for the gradient of scale of
constants, the error is relative to the smallest float32.
"""

if __name__ == "__main__":
    sys.exit(main())
