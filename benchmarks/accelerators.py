"""python -m benchmarks.accelerators: what compilers for TPUs and GPUs make of each norm.

Programs are compiled ahead of time and counted, not run: docs/accelerators.md says what the numbers
mean. All chips take about an hour on two cores; `--chips v5p --only layer` a minute.
"""

import argparse
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import accelerator_page as page
from benchmarks.cases import Problem
from benchmarks.chips import CHIPS, Chip, compiled, compiled_over
from benchmarks.collectives import collectives_of
from benchmarks.hlo import Program
from benchmarks.jax_norms import jaxnorm_norm, linen_norm
from benchmarks.kernel_calls import refusal, with_residual
from benchmarks.pallas_bytes import vmem
from benchmarks.programs import arguments, programs_of, size_of
from benchmarks.training_steps import steps, training_step
from jaxnorm.kernels import KERNELS

LIBRARIES: dict[str, Callable] = {"jaxnorm": jaxnorm_norm, "Flax": linen_norm}
BY_KERNEL = functools.partial(jaxnorm_norm, implementation="kernel")
# Batches that fill a chip.
SHAPES = {
    "batch": {"resnet-stem": (256, 56, 56, 64), "resnet-stage4": (256, 7, 7, 2048)},
    "layer": {"llama-7b": (8192, 4096), "vit-base": (256, 197, 768)},
    "rms": {"llama-7b": (8192, 4096)},
    "group": {"diffusion-unet": (64, 64, 64, 320), "diffusion-unet-8": (8, 64, 64, 320)},
    "instance": {"style-transfer": (16, 256, 256, 64)},
}
PROBLEMS = [
    Problem(norm, network, shape, dtype)
    for norm, shapes in SHAPES.items()
    for network, shape in shapes.items()
    for dtype in ("bfloat16", "float32")
]
# For kernels of rows, which have to be asked for.
ROWS = {
    "vit-base": (256, 197, 768),
    "gpt2": (65536, 768),
    "llama-7b": (8192, 4096),
    "wide": (2048, 16384),
}
FOR_KERNELS = [
    Problem(norm, network, shape, dtype)
    for norm in ("layer", "rms")
    for network, shape in ROWS.items()
    for dtype in ("bfloat16", "float32")
]
FOR_DEVICES = Problem("batch", "resnet-stage3", (256, 14, 14, 256), "bfloat16")
DEVICES = 8
PROGRAMS = ("forward", "backward", "context")
PARTS = ("norms", "steps", "devices", "kernels")


def measure(executable: Any, x: Any, least: float, **row: Any) -> dict[str, Any]:
    """A row of the results: what a compiled program moves and plans.

    Args:
      executable: from `compiled`.
      x: the array that passes are counted of.
      least: the bytes that must be moved.
      **row: what else belongs to the row.
    """
    text = executable.as_text()
    traffic, memory = Program(text).traffic(), executable.memory_analysis()
    return row | {
        "bytes": traffic.main,
        "least": least,
        "on_chip": traffic.chip,
        "scratch": memory.temp_size_in_bytes,
        "x": size_of(x),
        "passes": traffic.passes(x.size),
        "kernels": traffic.kernels,
        "vmem": vmem(text),
        "collectives": [
            {"kind": each.kind, "bytes": each.bytes, "sent": each.bytes_sent}
            for each in collectives_of(text)
        ],
    }


def norm_rows(
    chip: Chip,
    problem: Problem,
    libraries: Sequence[str] = tuple(LIBRARIES),
    programs: Sequence[str] = PROGRAMS,
) -> Iterator[dict[str, Any]]:
    """Forward, backward, and both in context; of each library."""
    x, params, weight = arguments(problem)
    about = {"chip": chip.name, "problem": problem._asdict(), "case": name_of(problem)}
    for library in libraries:
        norm = (LIBRARIES | {page.KERNEL: BY_KERNEL})[library](problem)
        row = about | {"library": library}
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
    """The chip's kernel, with and without a residual; and what Flax moves in context."""
    yield from norm_rows(chip, problem, [page.KERNEL], programs)
    if "context" in programs:
        yield from norm_rows(chip, problem, ["Flax"], ["context"])
    x, params, _ = arguments(problem)
    forward, backward = with_residual(KERNELS[chip.platform], problem)
    kept = jax.eval_shape(forward, x, x, params)[1:]
    row = {"chip": chip.name, "case": name_of(problem), "library": page.KERNEL}
    of_sums = {
        "forward, residual": (forward, (x, x, params), 4),
        "backward, residual": (backward, (kept, params, x, x), 4),
    }
    for name, (f, args, arrays) in of_sums.items():
        yield measure(compiled(chip, f, args), x, arrays * size_of(x), **row, program=name)


def step_rows(chip: Chip, step: Any) -> Iterator[dict[str, Any]]:
    """A whole training step, of each library."""
    for library in LIBRARIES:
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


def device_rows(
    chip: Chip, libraries: Sequence[str] = tuple(LIBRARIES)
) -> Iterator[dict[str, Any]]:
    """Batch norm over eight chips, in plain `jit` and in `shard_map`."""
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
            row = {"chip": chip.name, "case": f"{name_of(problem)}, {how}", "library": library}
            local = jax.ShapeDtypeStruct((x.shape[0] // DEVICES, *x.shape[1:]), x.dtype)
            n = size_of(local)
            yield measure(forward, local, 2 * n, **row, program="forward of 8")
            yield measure(both, local, 3 * n, **row, program="both of 8")


def batch_norm_over(problem: Problem, library: str, axis_name: str | None) -> Callable:
    """Batch norm of a library, with an axis name: y and the new state."""
    import flax.linen as nn

    import jaxnorm.linen

    module = {"jaxnorm": jaxnorm.linen, "Flax": nn}[library].BatchNorm(
        use_running_average=False, axis_name=axis_name, dtype=problem.dtype
    )
    zeros = jnp.zeros(problem.features)
    state = {"batch_stats": {"mean": zeros, "var": zeros}}
    return lambda x, params: module.apply({"params": params, **state}, x, mutable=["batch_stats"])


def name_of(problem: Problem) -> str:
    """As --only matches it."""
    return f"{problem.norm}/{problem.network}/{problem.dtype}"


def work(chip: Chip, parts: Sequence[str], only: str) -> Iterator[tuple[str, Callable]]:
    """The names of what is compiled for a chip, and functions that yield its rows."""
    if "norms" in parts:
        for problem in PROBLEMS:
            yield name_of(problem), lambda problem=problem: norm_rows(chip, problem)
    if "kernels" in parts:
        for problem in FOR_KERNELS:
            name, reason = name_of(problem), refusal(KERNELS[chip.platform], problem)
            if reason and re.search(only, name):
                print(f"{chip.name} {name}, by the kernel: left out, {reason}", file=sys.stderr)
            if not reason:
                yield name, lambda problem=problem: kernel_rows(chip, problem)
    if "devices" in parts:
        yield name_of(FOR_DEVICES), lambda: device_rows(chip)
    if "steps" in parts:
        for step in steps():
            yield step.name, lambda step=step: step_rows(chip, step)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(argv)
    names, parts = options.chips.split(","), options.parts.split(",")
    for given, known, flag in ((names, CHIPS, "--chips"), (parts, PARTS, "--parts")):
        for name in given:
            if name not in known:
                return fail(f"{flag} must be some of {', '.join(known)}, got {name!r}.")
    try:
        re.compile(options.only)
    except re.error as error:
        return fail(f"--only must be a regular expression, got {options.only!r} ({error}).")
    report = page.read(options.out / "results.json")
    if options.replot:
        if not report["rows"]:
            return fail(f"--replot must find {options.out / 'results.json'}; measure first.")
        page.write(report, options.out)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if missing := CHIPS[name].missing:
            print(f"{name}: left out, {missing}", file=sys.stderr)
            continue
        try:
            compile_all(CHIPS[name], parts, options.only, report, options.out)
        except KeyboardInterrupt:
            page.write(report, options.out)
            print("Interrupted: what was counted is written.", file=sys.stderr)
            return 130
    if not report["rows"]:
        return fail("Nothing was compiled; see the extras above, and --only.")
    page.write(report, options.out)
    print("\n".join(page.sentences(report["rows"])))
    return 0


def compile_all(
    chip: Chip, parts: Sequence[str], only: str, report: dict[str, Any], folder: Path
) -> None:
    """Compile for a chip; rows of what was compiled before are replaced.

    Each case is saved at once: compilers may crash.
    """
    for name, run in work(chip, parts, only):
        if not re.search(only, name):
            continue
        start, new = time.perf_counter(), list(run())
        keys = {page.key(row) for row in new}
        report["rows"] = [row for row in report["rows"] if page.key(row) not in keys] + new
        page.save(report, folder)
        seconds = time.perf_counter() - start
        print(f"{chip.name} {name}: {seconds:.0f} s", file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators",
        description="Count what compiled programs for TPUs and GPUs move; no chip is needed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--chips", default=",".join(CHIPS), metavar="A,B", help="default: %(default)s")
    add("--parts", default=",".join(PARTS), metavar="A,B", help="default: %(default)s")
    add("--only", default="", metavar="REGEX", help="only the cases whose name matches")
    out = Path("accelerator_results")
    add("--out", type=Path, default=out, metavar="DIR", help="added to; default: %(default)s")
    add("--replot", action="store_true", help="make table and figure from DIR/results.json")
    return parser.parse_args(argv)


def fail(sentence: str) -> int:
    """Print why the request cannot be fulfilled."""
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # no chip is looked for
    sys.exit(main())
