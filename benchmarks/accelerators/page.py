"""Results of `python -m benchmarks.accelerators`, as JSON, tables and a figure."""

import importlib.util
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.accelerators.chips import CHIPS
from benchmarks.report import as_json, replace

OURS, KERNEL, PEER = "jaxnorm", "jaxnorm, kernel", "Flax"
COLOR = "#D55E00"  # of Okabe and Ito
LIMIT = 1.02  # of Flax's bytes


def read(path: Path) -> dict[str, Any]:
    """Read the results of earlier runs; new ones are added to them."""
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what identifies a row."""
    return row["chip"], row["case"], row["program"], row["library"]


def write(report: dict[str, Any], folder: Path) -> None:
    """Write results.json, table.md and, with matplotlib, the figure."""
    save(report, folder)
    replace(folder / "table.md", "\n".join(tables(report["rows"])) + "\n")
    if importlib.util.find_spec("matplotlib"):
        draw(report["rows"], folder / "bytes.png")


def save(report: dict[str, Any], folder: Path) -> None:
    """Write results.json."""
    replace(folder / "results.json", as_json(report))


def ratios(rows: Iterable[dict[str, Any]], program: str, what: str = "bytes") -> dict:
    """Divide our numbers by Flax's, for each chip and case."""
    found = {key(row): row[what] for row in rows if row["program"] == program}
    return {
        (chip, case): value / found[chip, case, program, PEER]
        for (chip, case, _, library), value in found.items()
        if library == OURS and found.get((chip, case, program, PEER))
    }


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Return all tables, in Markdown."""
    lines = ["# Bytes over Flax's, in context and in whole training steps", ""]
    lines += overview(rows)
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    for chip in chips:
        own = [row for row in rows if row["chip"] == chip]
        lines += ["", f"## {chip}", "", *norm_table(own)]
        lines += step_table([row for row in own if row["program"] == "step"])
        lines += device_table([row for row in own if row["program"].endswith("of 8")])
        lines += kernel_table(own)
    return lines


def overview(rows: list[dict[str, Any]]) -> list[str]:
    """List our bytes over Flax's, for each case and chip."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines = [f"| case | {' | '.join(chips)} |", "|---" + "|---:" * len(chips) + "|"]
    for program in ("context", "step"):
        found = ratios(rows, program)
        for case in dict.fromkeys(case for _, case in found):
            cells = (f"{found[chip, case]:.3f}" if (chip, case) in found else "" for chip in chips)
            lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def norm_table(rows: list[dict[str, Any]]) -> list[str]:
    """List bytes over the fewest possible, passes, kernels, scratch and residuals."""
    lines = [
        "| case | library | forward | backward | context, over x | passes in context | kernels | "
        "scratch: forward | backward | residuals over x |",
        "|---|---|" + "---:|" * 8,
    ]
    found = {key(row)[1:]: row for row in rows}
    for case, library in dict.fromkeys(
        (row["case"], row["library"]) for row in rows if row["program"] == "backward"
    ):
        forward, backward, context = (
            found[case, program, library] for program in ("forward", "backward", "context")
        )
        cells = [
            f"{forward['bytes'] / forward['least']:.2f}",
            f"{backward['bytes'] / backward['least']:.2f}",
            f"{context['bytes'] / context['x']:.2f}",
            f"{context['passes']:g}",
            _kernels(context),
            f"{forward['scratch'] / forward['x']:.2f}",
            f"{backward['scratch'] / backward['x']:.2f}",
            f"{forward['kept'] / forward['x']:.2f}",
        ]
        lines.append(f"| {case} | {library} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def step_table(rows: list[dict[str, Any]]) -> list[str]:
    """List bytes, kernels and scratch of whole training steps."""
    if not rows:
        return []
    lines = ["", "| training step | library | GiB moved | GiB in VMEM | kernels | MiB of scratch |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        moved, on_chip = row["bytes"] / 2**30, row["on_chip"] / 2**30
        cells = f"{moved:.2f} | {on_chip:.2f} | {_kernels(row)} | {row['scratch'] / 2**20:,.0f}"
        lines.append(f"| {row['case']} | {row['library']} | {cells} |")
    return lines


def device_table(rows: list[dict[str, Any]]) -> list[str]:
    """List the collectives of programs over eight chips."""
    if not rows:
        return []
    lines = ["", "| on eight chips | program | library | collectives | bytes of each |"]
    lines.append("|---|---|---|---|---:|")
    for row in rows:
        kinds = ", ".join(each["kind"] for each in row["collectives"])
        sizes = ", ".join(f"{each['bytes']:,}" for each in row["collectives"])
        program = row["program"].removesuffix(" of 8")
        lines.append(f"| {row['case']} | {program} | {row['library']} | {kinds} | {sizes} |")
    return lines


def kernel_table(rows: list[dict[str, Any]]) -> list[str]:
    """List a kernel's bytes over the fewest possible, over Flax's in context, and its scratch."""
    found = {key(row)[1:]: row for row in rows}
    cases = [case for case, program, library in found if (program, library) == ("forward", KERNEL)]
    if not cases:
        return []
    over = lambda row, what, of: f"{row[what] / row[of]:.3f}"
    lines = [
        "",
        "| by the kernel | forward | backward | with residual: forward | backward | "
        "context, over Flax | scratch over x |",
        "|---|" + "---:|" * 6,
    ]
    for case in cases:
        own = {program: row for (c, program, by), row in found.items() if (c, by) == (case, KERNEL)}
        names = ("forward", "backward", "forward, residual", "backward, residual")
        cells = [over(own[name], "bytes", "least") if name in own else "" for name in names]
        flax = found.get((case, "context", PEER))
        cells.append(f"{own['context']['bytes'] / flax['bytes']:.3f}" if flax else "")
        alone = [row for name, row in own.items() if name != "context"]
        cells.append(f"{max(row['scratch'] / row['x'] for row in alone):.3f}")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    """Summarize the results of each chip."""
    lines = []
    for chip in dict.fromkeys(row["chip"] for row in rows):
        for program, words in (("context", "in context"), ("step", "in whole training steps")):
            found = {case: r for (c, case), r in ratios(rows, program).items() if c == chip}
            if not found:
                continue
            mean = math.exp(sum(map(math.log, found.values())) / len(found))
            worst = max(found, key=lambda case, found=found: found[case])
            lines.append(
                f"{chip}: {words}, jaxnorm moves {mean:.2f} times the bytes of Flax (geometric "
                f"mean of {len(found)} cases); most for {worst}: {found[worst]:.2f}."
            )
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw our bytes over Flax's, for each case and chip."""
    from matplotlib.figure import Figure

    found = {**ratios(rows, "context"), **ratios(rows, "step")}
    if not found:
        return
    chips = list(dict.fromkeys(chip for chip, _ in found))
    cases = list(dict.fromkeys(case for _, case in found))
    figure = Figure(figsize=(3.5 + 2.1 * len(chips), 1.8 + 0.24 * len(cases)), dpi=130)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(chips), sharex=True, sharey=True, squeeze=False)[0]
    for chip, axes in zip(chips, panels, strict=True):
        for (of_chip, case), ratio in found.items():
            if of_chip == chip:
                axes.plot(ratio, cases.index(case), "o", color=COLOR, ms=5)
        axes.axvline(1, color="#333333", lw=1)
        axes.set_title(chip, size=10)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.supxlabel("bytes moved by jaxnorm / bytes moved by Flax", size=9)
    figure.suptitle(
        "Norm, matmul and backward pass, and whole training steps: at 1, as many bytes as Flax",
        size=10,
    )
    new = path.with_suffix(".new")
    figure.savefig(new, format="png")
    os.replace(new, path)


def _kernels(row: dict[str, Any]) -> str:
    """Count the kernels that a GPU starts; a TPU starts its program once."""
    counted = "kernels" in row and CHIPS[row["chip"]].platform == "cuda"
    return f"{row['kernels']:,g}" if counted else ""
