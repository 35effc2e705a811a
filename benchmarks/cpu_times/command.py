"""The command `python -m benchmarks`: measure, print a summary, and write tables and figures."""

import argparse
import importlib.util
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.cpu_times.machine import describe, import_seconds
from benchmarks.cpu_times.measure import measure
from benchmarks.cpu_times.summary import OURS, peer_medians, sentences, summarize
from benchmarks.cpu_times.table import markdown, seconds
from benchmarks.programs.cases import Case, all_cases, quick_cases
from benchmarks.programs.peers import PEERS, Peer
from benchmarks.report import as_json, replace


class UserError(Exception):
    """The request cannot be fulfilled; the message is one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parse(argv)
    try:
        if options.replot:
            report = read(options.out)
        else:
            if options.seconds is not None and not options.seconds > 0:
                raise UserError(
                    f"--seconds must be more than 0, got {options.seconds:g}; try --seconds 0.1."
                )
            cases, peers = choose_cases(options), choose_peers(options)
            make_folder(options.out)
            report = run(options, cases, peers)
        write(report, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(sentences(report["summary"], most=10)))
    return 130 if report["interrupted"] else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare jaxnorm's norms with those of other libraries.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="a few cases, no torch.compile, no import times: within a minute",
    )
    add("--only", metavar="REGEX", default="", help="only the cases whose name matches")
    add("--peers", metavar="A,B", help=f"only these of {', '.join(peer.name for peer in PEERS)}")
    add("--seconds", type=float, metavar="S", help="seconds for each case; default: 1.5")
    add(
        "--out",
        type=Path,
        default=Path("benchmark_results"),
        metavar="DIR",
        help="default: %(default)s",
    )
    add("--page-faults", action="store_true", help="do not keep freed memory pages")
    add("--replot", action="store_true", help="make tables and figures from DIR/results.json")
    return parser.parse_args(argv)


def choose_cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that --quick and --only select."""
    cases = quick_cases() if options.quick else all_cases()
    try:
        chosen = [case for case in cases if re.search(options.only, case.name)]
    except re.error as error:
        raise UserError(
            f"--only must be a regular expression, got {options.only!r} ({error}); try for example "
            "--only layer/gpt2."
        ) from None
    if not chosen:
        raise UserError(
            f"--only must be found in the name of a case, got {options.only!r}; names are like "
            f"{cases[0].name}."
        )
    return chosen


def choose_peers(options: argparse.Namespace) -> list[Peer]:
    """Return the peers that --peers selects: by default all, with --quick the fast ones."""
    if options.peers is None:
        return [peer for peer in PEERS if not (options.quick and peer.slow_to_compile)]
    names, known = options.peers.split(","), {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise UserError(
                f"--peers must be some of {', '.join(known)}, got {name!r}; commas between them."
            )
    return [known[name] for name in names]


def run(options: argparse.Namespace, cases: list[Case], peers: list[Peer]) -> dict[str, Any]:
    """Measure all cases, or until Ctrl-C."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
    # Every call is waited for: a separate thread for the program would only add its wake-up time.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    budget = options.seconds or (0.4 if options.quick else 1.5)
    report: dict[str, Any] = {
        "machine": describe(),
        "settings": {"quick": options.quick, "only": options.only, "seconds_per_case": budget},
        "imports": {},
        "results": [],
        "not_run": [],
        "interrupted": False,
    }
    why_not = {peer.name: "left out by --peers." for peer in PEERS if peer not in peers}
    if options.peers is None:
        why_not = dict.fromkeys(why_not, "left out by --quick.")
    why_not |= {
        peer.name: f"not installed; pip install {peer.install}"
        for peer in peers
        if not peer.installed
    }
    if options.quick:
        why_not["import times"] = "left out by --quick."
    for name, reason in why_not.items():
        progress(f"{name}: {reason}")
        report["not_run"].append({"case": "*", "peer": name, "reason": reason})
    peers = [peer for peer in peers if peer.installed]
    start = time.perf_counter()
    # A new cache, so PyTorch does not load what an earlier run has compiled.
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        try:
            if not options.quick:
                for module in dict.fromkeys(["jax", *(peer.module for peer in peers)]):
                    report["imports"][module] = import_seconds(module)
            measure_all(report, cases, peers, budget)
        except KeyboardInterrupt:
            report["interrupted"] = True
            done = len(report["results"])
            progress(
                f"Interrupted: {done} of {len(cases)} cases were measured and will be written."
            )
    report["settings"]["took_seconds"] = time.perf_counter() - start
    return report


def measure_all(
    report: dict[str, Any], cases: list[Case], peers: list[Peer], budget: float
) -> None:
    """Measure each case, add it to the report and print it."""
    rng = random.Random(0)
    rounds = 5 if report["settings"]["quick"] else 11
    for number, case in enumerate(cases, 1):
        result, not_run = measure(case, peers, budget, rounds, rng)
        report["results"].append(result)
        report["not_run"] += not_run
        for row in not_run:
            progress(f"{case.name}: without {row['peer']}: {row['reason']}")
        times = sorted((value, name) for name, value in peer_medians(result).items())
        if OURS in result["peers"]:
            times.insert(0, (result["peers"][OURS]["median"], OURS))
        words = ", ".join(f"{name} {seconds(value)}" for value, name in times[:3])
        progress(f"[{number}/{len(cases)}] {case.name}: {words}")


def read(folder: Path) -> dict[str, Any]:
    """Read the results of an earlier run."""
    path = folder / "results.json"
    if not path.exists():
        raise UserError(
            f"--replot must find {path}, but there is no such file; measure first, or set --out."
        )
    try:
        report = json.loads(path.read_text())
        summarize(report["results"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--replot must find the results of a run in {path}, got something else; measure again."
        ) from None
    return report


def make_folder(folder: Path) -> None:
    """Make the folder before measuring, so no run is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written to, got {folder} ({error.strerror}); "
            "choose another."
        ) from None


def write(report: dict[str, Any], folder: Path) -> None:
    """Write results.json, table.md and the figures."""
    report["summary"] = summarize(report["results"])
    replace(folder / "results.json", as_json(report))
    replace(folder / "table.md", markdown(report))
    written = ["results.json", "table.md"]
    if not report["results"]:
        progress("No figures: nothing was measured.")
    elif importlib.util.find_spec("matplotlib") is None:
        progress("No figures: matplotlib is not installed; pip install matplotlib, then --replot.")
    else:
        from benchmarks.cpu_times import figures

        for name in ("gains", "ratios", "roofline"):
            if getattr(figures, f"draw_{name}")(report, folder / f"{name}.png"):
                written.append(f"{name}.png")
    progress(f"Written to {folder}: {', '.join(written)}")


def progress(line: str) -> None:
    """Print progress to stderr."""
    print(line, file=sys.stderr, flush=True)
