"""python -m benchmarks.chip_times: time norms and training steps on the chip at hand.

The programs are those of `benchmarks.accelerators`, which counts their bytes without the chip.
"jaxnorm" is what users get; on GPUs that is a kernel for layer and rms norm. Each round runs all
calls of a case in another order; times are medians. The norms in bfloat16 and three training steps
took four minutes on an H100.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.chip_times import figure as chip_figure
from benchmarks.programs.cases import CHIP_PROBLEMS, Case, Problem
from benchmarks.programs.jax_norms import jaxnorm_norm, linen_norm
from benchmarks.programs.norms import arguments, programs_of
from benchmarks.programs.peers import PEERS
from benchmarks.programs.timing import Call, take_turns
from benchmarks.programs.training_steps import Step, steps, training_step
from benchmarks.report import as_json

JAX_NORMS: dict[str, Callable] = {
    "jaxnorm": jaxnorm_norm,
    "jaxnorm (xla)": partial(jaxnorm_norm, implementation="xla"),
    "flax.linen": linen_norm,
}
LEAST = {"forward": 2, "backward": 3}  # arrays of the size of x


def norm_calls(problem: Problem, torch: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a name such as "forward, flax.linen" and its call; and a copy of x."""
    x, params, weight = (draw(shapes, seed) for seed, shapes in enumerate(arguments(problem)))
    dy = draw(x, 3)
    copy = jax.jit(jnp.negative)
    yield "copy", lambda: copy(x)
    for library, make in JAX_NORMS.items():
        programs = programs_of(make(problem))
        forward, context = jax.jit(programs.forward), jax.jit(programs.context)
        pullback = jax.jit(programs.pullback)(x, params)
        backward = jax.jit(programs.backward)
        yield f"forward, {library}", partial(forward, x, params)
        yield f"backward, {library}", partial(backward, pullback, dy)
        yield f"context, {library}", partial(context, x, params, weight)
    for peer in PEERS if torch else ():
        if peer.module == "torch" and peer.installed:
            for mode in LEAST:
                yield f"{mode}, {peer.name}", peer.make(Case(problem, mode)).run


def step_calls(step: Step) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield a name, "step, library", and a call that makes one step."""
    for library in ("jaxnorm", "Flax"):
        update, shapes = training_step(step, library)
        state, *batch = (draw(shape, seed) for seed, shape in enumerate(shapes))
        program = jax.jit(update, donate_argnums=0).lower(state, *batch).compile()
        held = [state]

        def run(program=program, held=held, batch=batch):
            held[0], loss = program(held[0], *batch)
            return loss

        yield f"step, {library}", run


def draw(shapes: Any, seed: int) -> Any:
    """Draw random arrays of these shapes; integers are small."""
    rng = np.random.default_rng(seed)  # on the host: JAX would compile a program for each shape

    def one(like):
        if jnp.issubdtype(like.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 200, like.shape), like.dtype)
        return jnp.asarray(rng.standard_normal(like.shape, np.float32) / 8, like.dtype)

    return jax.tree.map(one, shapes)


def timed(calls: Iterator[tuple[str, Callable]], seconds: float) -> dict[str, float]:
    """Return the median seconds of each call."""
    ready = {}
    for name, run in calls:
        wait = synchronize_torch if "torch" in name else jax.block_until_ready
        ready[name] = Call(run, wait, dict, queued=True)
        wait(run())
    measured = take_turns(ready, seconds, random.Random(0), rounds=5)
    return {name: statistics.median(each) for name, each in measured.items()}


def synchronize_torch(_: Any) -> None:
    """Wait for PyTorch's device."""
    import torch  # pyright: ignore[reportMissingImports] (optional)

    torch.cuda.synchronize()


def line(row: dict[str, Any]) -> str:
    """Write a case as text: microseconds, and for a norm the share of a copy's rate."""
    times, cells = row["times"], []
    for name, seconds in times.items():
        program = name.partition(",")[0]
        share = ""
        if program in LEAST:
            share = f" ({LEAST[program] / 2 * times['copy'] / seconds:.0%})"
        cells.append(f"{name} {seconds * 1e6:,.0f}{share}")
    return f"{row['case']}: " + "; ".join(cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chip_times",
        description="Time norms and training steps on the chip at hand, in microseconds.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="only the cases whose name matches")
    add("--seconds", type=float, default=0.5, metavar="S", help="for each case; default: 0.5")
    add("--torch", action="store_true", help="PyTorch too, eager and compiled")
    add("--out", type=Path, default=Path("chip_times.json"), help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        chosen = re.compile(options.only)
    except re.error as error:
        return fail(f"--only must be a regular expression, got {options.only!r} ({error}).")
    if not 0 < options.seconds < math.inf:
        return fail(f"--seconds must be more than 0, got {options.seconds:g}; try --seconds 0.1.")
    if options.out.suffix != ".json" or not options.out.parent.is_dir():
        return fail(f"--out must be a .json file in a folder that exists, got {options.out}.")
    if options.torch and not torch_is_here():
        return fail("--torch must find PyTorch for the device that JAX uses; leave it out.")
    work: dict[str, Callable] = {
        problem.name: partial(norm_calls, problem, options.torch) for problem in CHIP_PROBLEMS
    }
    work |= {step.name: partial(step_calls, step) for step in steps() if not step.axis_name}
    wanted = [name for name in work if chosen.search(name)]
    if not wanted:
        known = "\n  ".join(work)
        return fail(f"--only must match a case, got {options.only!r}; there are\n  {known}")
    report = {"device": jax.devices()[0].device_kind, "versions": versions(), "rows": []}
    try:
        for name in wanted:
            report["rows"].append({"case": name, "times": timed(work[name](), options.seconds)})
            options.out.write_text(as_json(report))  # a run may be cut short
            print(line(report["rows"][-1]), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("Interrupted: what was timed is written.", file=sys.stderr)
        return 130
    print(chip_figure.table(report))
    if importlib.util.find_spec("matplotlib"):
        chip_figure.draw(report, options.out.with_suffix(".png"))
    return 0


def torch_is_here() -> bool:
    """Return whether PyTorch can run on JAX's GPU."""
    if jax.default_backend() != "gpu" or not importlib.util.find_spec("torch"):
        return False
    import torch  # pyright: ignore[reportMissingImports] (optional)

    return torch.cuda.is_available()


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect the times."""
    names = ("jax", "jaxlib", "flax", "torch")
    return {
        name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)
    }


def fail(sentence: str) -> int:
    """Print why the request cannot be fulfilled."""
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
