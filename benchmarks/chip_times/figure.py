"""The table and the figure of `benchmarks.chip_times`, from its results."""

from pathlib import Path
from typing import Any

PROGRAMS = ("forward", "backward", "context")
PEER = "flax.linen"
# From the palette of Okabe and Ito, which is safe for colour-blind readers.
LOOKS = {
    "jaxnorm": ("o", "#D55E00"),
    "jaxnorm (xla)": ("D", "#E69F00"),
    "torch": ("s", "#56B4E9"),
    "torch.compile": ("^", "#0072B2"),
}


def gains(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Divide Flax's time by each library's, for each program of a norm."""
    times = {tuple(name.split(", ", 1)): seconds for name, seconds in row["times"].items()}
    return {
        program: {
            library: times[program, PEER] / times[program, library]
            for library in LOOKS
            if (program, library) in times
        }
        for program in PROGRAMS
        if (program, PEER) in times
    }


def table(report: dict[str, Any]) -> str:
    """Tabulate microseconds: jaxnorm's default, jaxnorm by XLA alone, and the others."""
    libraries = ["jaxnorm", "jaxnorm (xla)", PEER, "torch", "torch.compile"]
    lines = [
        f"| case | program | {' | '.join(libraries)} |",
        "|---|---|" + "---:|" * len(libraries),
    ]
    for row in report["rows"]:
        times = {name: f"{seconds * 1e6:,.0f}" for name, seconds in row["times"].items()}
        for program in PROGRAMS:
            cells = [times.get(f"{program}, {library}", "") for library in libraries]
            if any(cells):
                lines.append(f"| {row['case']} | {program} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as Flax each library is, for each case and program."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if gains(row)]
    figure = Figure(figsize=(11, 0.42 * len(rows) + 2.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, program in zip(panels, PROGRAMS, strict=True):
        for place, row in enumerate(rows):
            # jaxnorm last, on top.
            for library, gain in reversed(gains(row)[program].items()):
                marker, color = LOOKS[library]
                axes.plot(gain, place, marker, color=color, ms=8, alpha=0.85, clip_on=False)
        axes.axvline(1, color="black", lw=1)
        axes.set_title(f"{program}: times as fast as Flax")
        axes.set_yticks(range(len(rows)), [row["case"] for row in rows])
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    handles = [
        panels[0].plot([], [], marker, color=color, ms=8, label=library)[0]
        for library, (marker, color) in LOOKS.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(LOOKS), frameon=False)
    figure.suptitle(f"{report['device']}, jax {report['versions']['jax']}; the line is Flax")
    figure.savefig(path, format="png")
