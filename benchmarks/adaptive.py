"""python -m benchmarks.adaptive: scale and bias per example or position, by the norm or by hand.

Compare a norm that takes scale and bias with norm(x) * (1 + scale) + bias, by jaxnorm's norm and by
Flax's: times and scratch memory on the device at hand, and bytes of programs compiled for other
chips (--chips). The results are in docs/benchmarks.md.
"""

import argparse
import functools
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxnorm as jn
from benchmarks.accelerators.chips import CHIPS, compiled
from benchmarks.accelerators.rows import measure
from benchmarks.programs import jax_calls
from benchmarks.programs.timing import take_turns

Norm = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Problem(NamedTuple):
    """An adaptive norm: where it is used, the shape of x, and that of scale and bias."""

    name: str
    norm: str
    shape: tuple[int, ...]
    leaf: tuple[int, ...]


PROBLEMS = [
    Problem("DiT-S/8, adaptive layer norm", "layer", (64, 64, 384), (64, 1, 384)),
    Problem("DiT-XL/2, adaptive layer norm", "layer", (16, 256, 1152), (16, 1, 1152)),
    Problem("style transfer, AdaIN", "instance", (8, 64, 64, 64), (8, 1, 1, 64)),
    Problem("image synthesis, SPADE", "instance", (8, 64, 64, 64), (8, 64, 64, 64)),
    Problem("GAN, conditional batch norm", "batch", (64, 16, 16, 256), (64, 1, 1, 256)),
]


def ways(norm: str, features: int) -> dict[str, Norm]:
    """Return the ways to compute a norm."""
    state = jn.init_batch_norm_state(features)
    functions: dict[str, Callable] = {
        "layer": jn.layer_norm,
        "instance": functools.partial(jn.instance_norm, epsilon=1e-6),
        "batch": lambda x, params=None, **options: jn.batch_norm(
            x, state, params=params, **options
        )[0],
    }
    ours = functions[norm]
    plain: dict[str, Any] = {"use_scale": False, "use_bias": False}
    theirs = {
        "layer": nn.LayerNorm(**plain),
        "instance": nn.InstanceNorm(**plain),
        "batch": nn.BatchNorm(use_running_average=False, **plain),
    }[norm]

    def flax(x):
        stats = {"mean": state.mean, "var": state.var}
        return theirs.apply({"batch_stats": stats}, x, mutable=["batch_stats"])[0].astype(x.dtype)

    by_hand = lambda f: lambda x, scale, bias: f(x) * (1 + scale) + bias
    in_params = lambda x, scale, bias: ours(x, jn.NormParams(scale, bias), scale_offset=1.0)
    return {"`params`": in_params, "by hand": by_hand(ours), "Flax, by hand": by_hand(flax)}


def programs(f: Norm) -> dict[str, Callable]:
    """Return the forward pass, and both passes."""

    def both(x, scale, bias, dy):
        y, pullback = jax.vjp(f, x, scale, bias)
        return y, pullback(dy)

    return {"forward": lambda x, scale, bias, dy: f(x, scale, bias), "both passes": both}


def rows_here(problem: Problem, dtype: str, seconds: float) -> Iterator[str]:
    """Measure times, in microseconds, and scratch memory, in sizes of x."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (problem.shape, problem.leaf, problem.leaf, problem.shape)
    args = [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]
    found = ways(problem.norm, problem.shape[-1])
    for part in ("forward", "both passes"):
        calls = {}
        for name, f in found.items():
            program = programs(f)[part]
            calls[name] = jax_calls.compiled(lambda *a, g=program: ({}, g(*a)), *args)
        times = take_turns(calls, seconds, random.Random(0), rounds=11)
        cells = (
            f"{statistics.median(times[name]) * 1e6:,.0f} µs, "
            f"{(call.scratch_bytes or 0) / args[0].nbytes:.2f}"
            for name, call in calls.items()
        )
        yield f"| {problem.name}, {dtype} | {part} | " + " | ".join(cells) + " |"


def rows_of_chip(name: str, problem: Problem, dtype: str) -> Iterator[str]:
    """Count bytes, in sizes of x."""
    like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    args = tuple(map(like, (problem.shape, problem.leaf, problem.leaf, problem.shape)))
    for part in ("forward", "both passes"):
        found = [
            measure(compiled(CHIPS[name], programs(f)[part], args), args[0], 1)
            for f in ways(problem.norm, problem.shape[-1]).values()
        ]
        numbers = " | ".join(f"{row['bytes'] / row['x']:.2f}" for row in found)
        yield f"| {problem.name}, {dtype}, {name} | {part} | {numbers} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adaptive",
        description="Compare adaptive norms that take scale and bias with the product by hand.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=2.0, metavar="S", help="for each row; default: 2")
    add("--chips", default="", metavar="NAMES", help=f"compile for some of {', '.join(CHIPS)}")
    add("--only", default="", metavar="WORDS", help="the problems with these words in their name")
    options = parser.parse_args(argv)
    chips = [name for name in options.chips.split(",") if name]
    for name in chips:
        if name not in CHIPS or CHIPS[name].missing:
            why = CHIPS[name].missing if name in CHIPS else f"there is no such chip, got {name!r}"
            print(f"--chips must be some of {', '.join(CHIPS)}: {why}.", file=sys.stderr)
            return 2
    print("| | | `params` | by hand | Flax, by hand |\n|---|---|---|---|---|")
    for problem in (each for each in PROBLEMS if options.only in each.name):
        for dtype in ("float32", "bfloat16"):
            parts = [rows_of_chip(name, problem, dtype) for name in chips]
            for rows in parts or [rows_here(problem, dtype, options.seconds)]:
                for row in rows:
                    print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
