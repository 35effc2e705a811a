"""Shared code of the examples: the command line, and the training loop with checkpoints.

An example is a script of one page that reads from top to bottom and contains its model and its
training step. A step is a pure function, `step(state, *batch) -> state, metrics`, and a batch
depends only on the number of its step. So `train` can continue from the saved state and step alone.
"""

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from storage import Checkpoints, UserError, read_metrics, replacing, why, write_metrics
from tqdm import tqdm


class DivergedError(UserError):
    """The loss is not finite; `history` has the metrics of the steps before."""

    def __init__(self, text: str, history: list[dict[str, float]]):
        """Keep the metrics of the steps before."""
        super().__init__(text)
        self.history = history


def at_least(least: int) -> Callable[[str], int]:
    """Return the argparse type of an integer with a lower bound."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Return the argparse type of a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < np.float32(number) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def numbers(text: str) -> list[float]:
    """Return the argparse type of a comma-separated list of numbers."""
    return sorted({positive(number) for number in text.split(",")})


def one_of(names: Collection[str]) -> Callable[[str], list[str]]:
    """Return the argparse type of a comma-separated list of names."""

    def read(text: str) -> list[str]:
        given = list(dict.fromkeys(text.replace(" ", "").split(",")))
        for name in given:
            if name not in names:
                allowed = ",".join(names)
                raise argparse.ArgumentTypeError(f"must be some of {allowed}, got {name!r}")
        return given

    return read


def make_parser(
    example: str,
    doc: str | None,
    compared: Collection[str],
    *,
    kind: str = "norms",
    **defaults: Any,
) -> argparse.ArgumentParser:
    """Return a parser with the flags that all examples share.

    `compared` is what the example compares: norms, or what `kind` calls them. `defaults` has steps,
    seeds, batch_size, and norms if not all of them; `free` names flags that may differ when a run
    is resumed, because they don't change what it computes.
    """
    defaults = {kind: list(compared), "checkpoint_every": 100, "free": ()} | defaults
    parser = argparse.ArgumentParser(
        f"{example}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    chosen = ",".join(defaults[kind])
    add(f"--{kind}", type=one_of(compared), help=f"of {','.join(compared)}; default: {chosen}")
    add("--steps", type=at_least(1), help="default: %(default)s")
    add("--seeds", type=at_least(1), help="how many; default: %(default)s")
    add("--batch-size", type=at_least(2), help="default: %(default)s")
    add("--quick", action="store_true", help="a short version: about a minute")
    folder = Path("runs") / example
    add("--out", type=Path, default=folder, help="folder for all results; default: %(default)s")
    add("--resume", action="store_true", help="continue the runs in --out")
    add("--checkpoint-every", type=at_least(1), help="steps; default: %(default)s")
    parser.set_defaults(example=example, **defaults)
    return parser


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    quick: Mapping[str, Any],
    study: Callable[[argparse.Namespace], None],
) -> int:
    """Read the command line and run the study; return the exit status.

    An error is printed as one sentence. With --quick, `quick` has the defaults.
    """
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    try:
        claim(args.out, args.resume)
        study(args)
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        text = "out of memory: try a smaller --batch-size"
        print(f"{parser.prog}: {text} ({why(error)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        text = (
            "interrupted; the same command with --resume continues from the last checkpoint, if any"
        )
        print(f"{parser.prog}: {text}", file=sys.stderr)
        return 130
    print(f"Figures, metrics and checkpoints: {args.out}")
    return 0


def leave(status: int) -> NoReturn:
    """Exit. If JAX is interrupted while it compiles, it may crash at interpreter shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 130:
        os._exit(status)
    sys.exit(status)


def claim(out: Path, resume: bool) -> None:
    """Make the folder for the results; reject one with other results in it."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder, but {out} is a file: choose another")
    if resume and not out.exists():
        raise UserError(
            f"--resume continues the runs in --out, but {out} does not exist: omit --resume to "
            "start new runs"
        )
    if not resume and out.exists() and any(out.iterdir()):
        raise UserError(
            f"--out must be empty or new, but {out} is not: add --resume to continue the runs "
            "in it, or choose another"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out must be a folder that can be made, got {out}: {error}") from error


# Flags that may differ when a run is resumed: they do not change what it computes.
FREE = ("free", "norms", "seeds", "quick", "out", "resume", "checkpoint_every", "text", "data_dir")


def train(
    args: argparse.Namespace,
    name: str,
    state: Any,
    step: Callable[..., tuple[Any, Mapping[str, jax.Array]]],
    batch: Callable[[int], tuple],
    *,
    steps: int | None = None,
    **settings: Any,
) -> tuple[Any, list[dict[str, float]]]:
    """Train the run `name` from its last checkpoint; return the state and all metrics.

    Its folder in --out contains metrics.jsonl, with a line for each step, and the checkpoints. A
    run is only resumed if the flags and these `settings` are the same.
    """
    total = steps or args.steps
    folder = args.out / name
    flags = {key: value for key, value in vars(args).items() if key not in (*FREE, *args.free)}
    settings = {"example": args.example, "run": name} | flags | settings
    settings = json.loads(json.dumps(settings, default=str))
    checkpoints = Checkpoints(folder / "checkpoints", settings)
    state, start = checkpoints.restore(state)
    history = read_metrics(folder / "metrics.jsonl", start)
    # A progress bar on a terminal, otherwise one line for each run.
    bar = tqdm(total=total, initial=start, desc=name, unit="step", disable=None)
    if bar.disable:
        print(f"{name}: steps {start} to {total}", file=sys.stderr, flush=True)
    with bar, checkpoints.manager:
        for number in range(start, total):
            state, metrics = step(state, *batch(number))
            # Sorted by name, as jit returns them, but with the loss first.
            metrics = {"loss": 0.0} | {key: float(value) for key, value in metrics.items()}
            saving = (number + 1) % args.checkpoint_every == 0 or number + 1 == total
            wrong = [f"{key} is {x}" for key, x in metrics.items() if not math.isfinite(x)]
            if not wrong and saving and not is_finite(state):
                wrong = ["weights are not finite"]
            if wrong:
                write_metrics(folder / "metrics.jsonl", history)
                raise DivergedError(
                    f"{name}: the {wrong[0]} at step {number + 1}: try a lower learning rate, or "
                    "omit this run",
                    history,
                )
            history.append({"step": number + 1} | metrics)
            bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
            bar.update()
            if saving:
                write_metrics(folder / "metrics.jsonl", history)
                checkpoints.save(number + 1, state)
    return state, history


def is_finite(state: Any) -> bool:
    """Return whether all numbers of a state are finite."""
    return all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state))


def report(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the scores as a table, and write them to scores.csv."""
    with replacing(out / "scores.csv") as unfinished, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    show = lambda value: (
        f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    )
    lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)))
