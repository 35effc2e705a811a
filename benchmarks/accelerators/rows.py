"""Compile programs and count their bytes: the rows of results.json."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerators.chips import Chip, compiled, compiled_over
from benchmarks.accelerators.collectives import collectives_of
from benchmarks.accelerators.hlo import Program
from benchmarks.accelerators.kernel_calls import with_residual
from benchmarks.accelerators.page import KERNEL
from benchmarks.programs.cases import Problem
from benchmarks.programs.jax_norms import jaxnorm_norm, linen_norm
from benchmarks.programs.norms import arguments, programs_of, size_of
from benchmarks.programs.training_steps import Step, training_step
from jaxnorm.kernels import KERNELS, VARIABLE

LIBRARIES: dict[str, Callable] = {"jaxnorm": jaxnorm_norm, "Flax": linen_norm}
BY_KERNEL = functools.partial(jaxnorm_norm, implementation="kernel")
PROGRAMS = ("forward", "backward", "context")
FOR_DEVICES = Problem("batch", "resnet-stage3", (256, 14, 14, 256), "bfloat16")
DEVICES = 8


def measure(executable: Any, x: Any, least: float, **row: Any) -> dict[str, Any]:
    """Return a row of the results: what a compiled program moves and allocates.

    Args:
      executable: from `compiled`.
      x: the array whose reads are counted as passes.
      least: the fewest bytes that the program can move.
      **row: other fields of the row.
    """
    traffic, memory = Program(executable.as_text()).traffic(), executable.memory_analysis()
    return row | {
        "bytes": traffic.main,
        "least": least,
        "on_chip": traffic.chip,
        "scratch": memory.temp_size_in_bytes,
        "x": size_of(x),
        "passes": traffic.passes(x.size),
        "kernels": traffic.kernels,
    }


def norm_rows(
    chip: Chip,
    problem: Problem,
    libraries: Sequence[str] = tuple(LIBRARIES),
    programs: Sequence[str] = PROGRAMS,
) -> Iterator[dict[str, Any]]:
    """Measure forward, backward, and both in context, for each library."""
    x, params, weight = arguments(problem)
    for library in libraries:
        norm = (LIBRARIES | {KERNEL: BY_KERNEL})[library](problem)
        row = {"chip": chip.name, "case": problem.name, "library": library}
        parts = programs_of(norm)
        kept = jax.eval_shape(parts.pullback, x, params)
        n = size_of(x)
        if "forward" in programs:
            program = compiled(chip, parts.forward, (x, params))
            yield measure(program, x, 2 * n, **row, program="forward", kept=size_of(kept))
        if "backward" in programs:
            program = compiled(chip, parts.backward, (kept, x))
            yield measure(program, x, 3 * n, **row, program="backward")
        if "context" in programs:
            program = compiled(chip, parts.context, (x, params, weight))
            yield measure(program, x, n, **row, program="context")


def kernel_rows(
    chip: Chip, problem: Problem, programs: Sequence[str] = PROGRAMS
) -> Iterator[dict[str, Any]]:
    """Measure the chip's kernel, with and without a residual, and Flax in context."""
    yield from norm_rows(chip, problem, [KERNEL], programs)
    if "context" in programs:
        yield from norm_rows(chip, problem, ["Flax"], ["context"])
    x, params, _ = arguments(problem)
    forward, backward = with_residual(KERNELS[chip.platform], problem)
    kept = jax.eval_shape(forward, x, x, params)[1:]
    row = {"chip": chip.name, "case": problem.name, "library": KERNEL}
    of_sums = {
        "forward, residual": (forward, (x, x, params), 4),
        "backward, residual": (backward, (kept, params, x, x), 4),
    }
    for name, (f, args, arrays) in of_sums.items():
        yield measure(compiled(chip, f, args), x, arrays * size_of(x), **row, program=name)


def step_rows(
    chip: Chip, step: Step, libraries: Sequence[str] = tuple(LIBRARIES)
) -> Iterator[dict[str, Any]]:
    """Measure a whole training step of each library."""
    for library in libraries:
        update, args = training_step(step, library)
        if step.axis_name:
            sharded = (False, True, True)
            results = lambda *args, update=update: tuple(reversed(update(*args)))
            program = compiled_over(
                chip, results, args, sharded, 1, axis_name=step.axis_name, donate=(0,)
            )
        else:
            program = compiled(chip, update, args, donate=(0,))
        row = {"chip": chip.name, "case": step.name, "library": library, "program": "step"}
        yield measure(program, step.inputs, size_of(args[0]), **row)


def kernel_step_rows(chip: Chip, step: Step) -> Iterator[dict[str, Any]]:
    """Measure a training step of jaxnorm whose norms all use the chip's kernel."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "kernel"
    try:
        (row,) = step_rows(chip, step, ["jaxnorm"])
    finally:
        os.environ.pop(VARIABLE)
        os.environ.update({VARIABLE: before} if before else {})
    yield row | {"library": KERNEL}


def device_rows(
    chip: Chip, libraries: Sequence[str] = tuple(LIBRARIES)
) -> Iterator[dict[str, Any]]:
    """Measure batch norm over eight chips, in plain `jit` and in `shard_map`."""
    problem = FOR_DEVICES
    x, params, _ = arguments(problem)
    for library in libraries:
        for axis_name in (None, "data"):
            norm = batch_norm_over(problem, library, axis_name)

            def backward(x, params, dy, norm=norm):
                _, pullback = jax.vjp(lambda x: norm(x, params)[0], x)
                return pullback(dy)[0], jnp.zeros(())

            sharded = (True, False, True)
            forward = compiled_over(
                chip, norm, (x, params), sharded[:2], DEVICES, axis_name=axis_name
            )
            both = compiled_over(
                chip, backward, (x, params, x), sharded, DEVICES, axis_name=axis_name
            )
            how = "shard_map" if axis_name else "jit"
            row = {"chip": chip.name, "case": f"{problem.name}, {how}", "library": library}
            local = jax.ShapeDtypeStruct((x.shape[0] // DEVICES, *x.shape[1:]), x.dtype)
            n = size_of(local)
            for name, program, arrays in (("forward", forward, 2), ("both", both, 3)):
                found = [
                    {"kind": each.kind, "bytes": each.bytes}
                    for each in collectives_of(program.as_text())
                ]
                row |= {"program": f"{name} of 8", "collectives": found}
                yield measure(program, local, arrays * n, **row)


def batch_norm_over(problem: Problem, library: str, axis_name: str | None) -> Callable:
    """Return a library's batch norm with an axis name: y and the new state."""
    import flax.linen as nn

    import jaxnorm.linen

    module = {"jaxnorm": jaxnorm.linen, "Flax": nn}[library].BatchNorm(
        use_running_average=False, axis_name=axis_name, dtype=problem.dtype
    )
    zeros = jnp.zeros(problem.features)
    state = {"batch_stats": {"mean": zeros, "var": zeros}}
    return lambda x, params: module.apply({"params": params, **state}, x, mutable=["batch_stats"])
