"""python -m benchmarks.accelerators: count what norms move, compiled for TPUs and GPUs.

Compile programs ahead of time and count what they move; nothing is run.
docs/accelerators_method.md explains the numbers. All chips take about an hour on two cores;
`--chips v5p --only layer` takes a minute.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.accelerators import page
from benchmarks.accelerators.chips import CHIPS, Chip
from benchmarks.accelerators.kernel_calls import unsupported_reason
from benchmarks.accelerators.rows import (
    FOR_DEVICES,
    device_rows,
    kernel_rows,
    kernel_step_rows,
    norm_rows,
    step_rows,
)
from benchmarks.programs.cases import CHIP_PROBLEMS, Problem
from benchmarks.programs.training_steps import steps
from jaxnorm.kernels import KERNELS

# For kernels of rows.
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
PARTS = ("norms", "steps", "devices", "kernels")


def work(chip: Chip, parts: Sequence[str], only: str) -> Iterator[tuple[str, Callable]]:
    """Yield the name of each program for a chip, and a function that yields its rows."""
    if "norms" in parts:
        for problem in CHIP_PROBLEMS:
            yield problem.name, lambda problem=problem: norm_rows(chip, problem)
    if "kernels" in parts and chip.platform in KERNELS:
        for problem in FOR_KERNELS:
            name, reason = problem.name, unsupported_reason(KERNELS[chip.platform], problem)
            if reason and re.search(only, name):
                print(f"{chip.name} {name}, by the kernel: left out, {reason}", file=sys.stderr)
            if not reason:
                yield name, lambda problem=problem: kernel_rows(chip, problem)
        for step in steps():
            if step.rows and not KERNELS[chip.platform].unavailable_reason():
                yield step.name, lambda step=step: kernel_step_rows(chip, step)
    if "devices" in parts:
        yield FOR_DEVICES.name, lambda: device_rows(chip)
    if "steps" in parts:
        for step in steps():
            yield step.name, lambda step=step: step_rows(chip, step)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(argv)
    names, parts = options.chips.split(","), options.parts.split(",")
    for chosen, known, flag in ((names, CHIPS, "--chips"), (parts, PARTS, "--parts")):
        for name in chosen:
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
    """Compile for a chip, and replace earlier rows of the same programs.

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
