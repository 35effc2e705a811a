"""Markdown tables of the results."""

import math
from typing import Any

from benchmarks.cpu_times.summary import COPY, OURS, peer_medians, sentences

LEGEND = """\
Times are medians. The number next to each time is the largest error compared with float64, in units
in the last place of the dtype for the largest exact element: of y for *forward*, otherwise of the
worst gradient. *both* is the forward and the backward pass in one program, which returns y and all
gradients. *context* is both passes of matmul, bias, add, norm, matmul. *copy* reads and writes, in
total, the least bytes that the case must move. The fastest time of each row is bold."""
SCRATCH = """\
The scratch memory that XLA plans for the forward and the backward pass in one program, in addition
to arguments and results, in percent of x. It does not include memory that kernels allocate
themselves."""
DETAILS = """\
The lower and the upper quartile of the times: half of the measurements lie between them. The number
next to them is the compile time: that of XLA, or of the first call of torch.compile, whose program
of *both* is often cached from *backward*."""


def markdown(report: dict[str, Any]) -> str:
    """Return the whole page."""
    results = report["results"]
    parts = ["# Benchmark results", machine(report["machine"]), "\n".join(_list(report["summary"]))]
    if results:
        parts += [
            "## Times and errors",
            LEGEND,
            *filter(None, ["\n".join(notes(results))]),
            overview(results),
        ]
        parts += ["## Scratch memory", SCRATCH, scratch(results)]
        parts += ["## Quartiles and compile times", DETAILS, details(results)]
    if report["imports"]:
        parts += ["## Import time", imports(report["imports"])]
    if report["not_run"]:
        parts += ["## Not run", "\n".join(not_run(report["not_run"]))]
    return "\n\n".join(parts) + "\n"


def machine(described: dict[str, Any]) -> str:
    """Describe the machine in a paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in described["versions"].items())
    pages = (
        "Freed pages are kept, so results do not need new pages."
        if described["pages_kept"]
        else "Freed pages are returned to the system, so large results cause page faults."
    )
    return (
        f"{described['cpu']}, {described['cores']} cores, {described['system']}; JAX on "
        f"{described['backend']} ({described['device']}); {versions}. {pages}"
    )


def overview(results: list[dict[str, Any]]) -> str:
    """Return a row for each case and a column for each peer: time and error."""
    names = list(dict.fromkeys(name for result in results for name in result["peers"]))
    names.sort(key=lambda name: name == COPY)
    rows = []
    for result in results:
        fastest = min((peer_medians(result) | _ours(result)).values(), default=None)
        cells = []
        for name in names:
            measured = result["peers"].get(name)
            cells.append("" if measured is None else _time_and_error(measured, fastest))
        rows.append([result["case"], "x".join(map(str, result["shape"])), *cells])
    return _table(["case", "shape", *names], rows)


def scratch(results: list[dict[str, Any]]) -> str:
    """Return a row for each case with both passes, a column for each peer of known scratch."""
    both = [result for result in results if result["mode"] == "both"]
    known = lambda m: m["scratch_bytes"] is not None
    names = dict.fromkeys(name for r in both for name, m in r["peers"].items() if known(m))
    rows = []
    for result in both:
        size = math.prod(result["shape"]) * {"float32": 4, "bfloat16": 2}[result["dtype"]]
        found = (result["peers"].get(name) for name in names if name != COPY)
        cells = [f"{100 * m['scratch_bytes'] / size:.1f} %" if m else "" for m in found]
        rows.append([result["case"].removesuffix("/both"), f"{size:,}", *cells])
    return _table(["case", "bytes of x", *(name for name in names if name != COPY)], rows)


def details(results: list[dict[str, Any]]) -> str:
    """Return a row for each case and a column for each peer: quartiles and compile time."""
    names = list(dict.fromkeys(name for result in results for name in result["peers"]))
    rows = []
    for result in results:
        found = (result["peers"].get(name) for name in names)
        rows.append([result["case"], *(_quartiles(m) if m else "" for m in found)])
    return _table(["case", *names], rows)


def notes(results: list[dict[str, Any]]) -> list[str]:
    """Return a line for each way in which the calls of a peer differ from the others."""
    found = {(name, m["note"]): None for result in results for name, m in result["peers"].items()}
    return [f"- {name}: {note}." for name, note in found if note]


def imports(measured: dict[str, float]) -> str:
    """Return import times, each in a new process and with all that the module imports."""
    rows = [[f"`import {module}`", seconds(value)] for module, value in measured.items()]
    return _table(["", "median"], rows)


def not_run(rows: list[dict[str, str]]) -> list[str]:
    """Return a line for each reason, with its cases."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cases.setdefault((row["peer"], row["reason"]), []).append(row["case"])
    return [
        f"- {peer}, {'all cases' if where == ['*'] else ', '.join(where)}: {reason}"
        for (peer, reason), where in cases.items()
    ]


def seconds(value: float) -> str:
    """Write a time in a suitable unit."""
    for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _time_and_error(measured: dict[str, Any], fastest: float | None) -> str:
    time = seconds(measured["median"])
    time = f"**{time}**" if measured["median"] == fastest else time
    return time if measured["error"] is None else f"{time} ({measured['error']:.2g})"


def _quartiles(measured: dict[str, Any]) -> str:
    text = f"{seconds(measured['lower'])} to {seconds(measured['upper'])}"
    compiled = measured["compile_seconds"]
    return text if compiled is None else f"{text} ({seconds(compiled)})"


def _ours(result: dict[str, Any]) -> dict[str, float]:
    return {name: m["median"] for name, m in result["peers"].items() if name.startswith(OURS)}


def _list(summary: dict[str, Any]) -> list[str]:
    return [f"- {line}" if line[0] != " " else f"  - {line.strip()}" for line in sentences(summary)]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
