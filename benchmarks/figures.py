"""The results as two figures, for those who have matplotlib."""

from pathlib import Path
from typing import Any

from benchmarks.cases import MODES
from benchmarks.summary import COPY, OURS, ratio, speedup

# Of the palette of Okabe and Ito, made for all kinds of colour vision.
LOOKS = {OURS: ("#D55E00", "o"), "flax.linen": ("#0072B2", "s"), "torch": ("#009E73", "^")}
FASTEST = ("#000000", "D")
TITLES = {
    "forward": "forward",
    "backward": "backward alone",
    "both": "forward + backward",
    "context": "matmul, bias, add, norm, matmul",
}


def draw_ratios(report: dict[str, Any], path: Path) -> bool:
    """Jaxnorm's time over that of Flax and of the fastest peer: left of one, jaxnorm is faster.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    results = [result for result in report["results"] if ratio(result) is not None]
    if not results:
        return False
    rows = list(dict.fromkeys(_row(result) for result in results))
    modes = _modes(results)
    figure = Figure(figsize=(3.2 + 2.6 * len(modes), 2 + 0.2 * len(rows)), dpi=130)
    panels = figure.subplots(1, len(modes), sharey=True, sharex=True, squeeze=False)[0]
    series = [("flax.linen", "flax.linen", *LOOKS["flax.linen"][:2], 6)]
    series.append((None, "the fastest peer", *FASTEST, 4))
    for axes, mode in zip(panels, modes, strict=True):
        for peer, label, color, marker, size in series:
            points = [
                (r, rows.index(_row(result)))
                for result in results
                if result["mode"] == mode and (r := ratio(result, peer)) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, ms=size, label=label)
        axes.axvline(1, color="#999999", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.set_title(TITLES[mode], size=10)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    handles = {}
    for axes in panels:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.suptitle(_headline(report), size=11)
    figure.supxlabel("time of jaxnorm / time of the other (left of 1, jaxnorm is faster)", size=10)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, format="png")
    return True


def draw_roofline(report: dict[str, Any], path: Path) -> bool:
    """Bytes per second, counting those that must be moved, against a copy of as many.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    results = [result for result in report["results"] if COPY in result["peers"]]
    if not results:
        return False
    modes = _modes(results)
    figure = Figure(figsize=(1 + 4.2 * len(modes), 4.6), dpi=130)
    panels = figure.subplots(1, len(modes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        here = [result for result in results if result["mode"] == mode]
        axes.plot(*_rates(here, COPY), "-", color="#555555", lw=1.5, label="plain copy")
        for name, (color, marker) in LOOKS.items():
            style = {"color": color, "ms": 6, "mew": 1.2}
            both = [r for r in here if name in r["peers"]]
            for dtype, fill, label in (("float32", color, name), ("bfloat16", "none", None)):
                chosen = [r for r in both if r["dtype"] == dtype]
                axes.plot(*_rates(chosen, name), marker, mfc=fill, label=label, **style)
        axes.set(xscale="log", yscale="log", title=TITLES[mode])
        axes.set_xlabel("bytes that must be moved")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("GB/s")
    panels[0].legend(title="filled: float32; open: bfloat16", fontsize=9, title_fontsize=9)
    figure.suptitle("Speed of moving the bytes that must be moved, and of a plain copy", size=11)
    figure.set_layout_engine("constrained")
    figure.savefig(path, format="png")
    return True


def _rates(results: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    points = sorted(
        (r["minimum_bytes"], r["minimum_bytes"] / r["peers"][name]["median"] / 1e9) for r in results
    )
    return [x for x, _ in points], [y for _, y in points]


def _row(result: dict[str, Any]) -> str:
    return f"{result['norm']} {result['network']} {result['dtype']}"


def _modes(results: list[dict[str, Any]]) -> list[str]:
    return [mode for mode in MODES if any(result["mode"] == mode for result in results)]


def _headline(report: dict[str, Any]) -> str:
    named = (("the fastest peer", None), ("flax.linen", "flax.linen"))
    values = [(whom, speedup(report["results"], peer)) for whom, peer in named]
    means = ", ".join(f"{1 / value:.2f} of {whom}" for whom, value in values if value)
    machine = report["machine"]
    device = machine["cpu"] if machine["backend"] == "cpu" else machine["device"]
    return f"Time of jaxnorm on {device}, {machine['cores']} cores\ngeometric mean: {means}"
