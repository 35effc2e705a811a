"""Figures of the results; they need matplotlib."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.cpu_times.summary import COPY, OURS, ratio, speedup
from benchmarks.programs.cases import MODES

# From the palette of Okabe and Ito, which is safe for colour-blind readers.
LOOKS = {OURS: ("#D55E00", "o"), "flax.linen": ("#0072B2", "s"), "torch": ("#009E73", "^")}
FASTEST = ("#000000", "D")
TITLES = {
    "forward": "forward",
    "backward": "backward alone",
    "both": "forward and backward",
    "context": "both, in context",
}


def draw_ratios(report: dict[str, Any], path: Path) -> bool:
    """Draw time of jaxnorm / time of Flax and of the fastest peer: below 1, jaxnorm is faster.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    results = [result for result in report["results"] if ratio(result) is not None]
    if not results:
        return False
    rows = list(dict.fromkeys(_row(result) for result in results))
    figure = Figure(figsize=(10.5, 2.2 + 0.2 * len(rows)), dpi=130)
    panels = _panels(figure, results)
    series = {
        "the fastest peer": (None, *FASTEST, 5),
        "Flax": ("flax.linen", *LOOKS["flax.linen"], 4),
    }
    for mode, axes in panels.items():
        for label, (peer, color, marker, size) in series.items():
            points = [
                (r, rows.index(_row(result)))
                for result in results
                if result["mode"] == mode and (r := ratio(result, peer)) is not None
            ]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, marker, color=color, ms=size, label=label)
        axes.axvline(1, color="#777777", lw=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("time of jaxnorm / time of", size=9)
        axes.tick_params(labelsize=8)
    first, *_ = panels.values()
    first.set_yticks(range(len(rows)), rows)
    first.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, _headline(report), path)


def draw_gains(report: dict[str, Any], path: Path) -> bool:
    """Draw how many times as fast jaxnorm is: for each norm the geometric mean over its cases.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    norms = list(dict.fromkeys(result["norm"] for result in report["results"]))
    peers = {"Flax": "flax.linen", "PyTorch": "torch", "the fastest peer of each case": None}
    colors = {"Flax": LOOKS["flax.linen"][0], "PyTorch": LOOKS["torch"][0]}
    figure = Figure(figsize=(8, 0.9 + 0.55 * len(norms)), dpi=130)
    axes = figure.subplots()
    drawn = False
    for place, (label, peer) in enumerate(peers.items()):
        for row, norm in enumerate(norms):
            value = speedup([r for r in report["results"] if r["norm"] == norm], peer)
            if value is None:
                continue
            drawn = True
            color, y = colors.get(label, FASTEST[0]), row + 0.26 * (place - 1)
            axes.barh(y, value, 0.24, color=color, label=None if row else label)
            axes.annotate(f" {value:.1f}", (value, y), va="center", size=8)
    if not drawn:
        return False
    axes.axvline(1, color="#777777", lw=1)
    axes.set_yticks(range(len(norms)), [f"{norm} norm" for norm in norms])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("times as fast, geometric mean over its cases")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="jaxnorm beside", frameon=False, loc="lower right", fontsize=8)
    return _save(figure, _device(report), path)


def draw_roofline(report: dict[str, Any], path: Path) -> bool:
    """Draw bytes per second of those that must be moved, compared with a plain copy.

    Returns whether there was anything to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    results = [result for result in report["results"] if COPY in result["peers"]]
    if not results:
        return False
    figure = Figure(figsize=(10.5, 4.8), dpi=130)
    panels = _panels(figure, results)
    for mode, axes in panels.items():
        here = [result for result in results if result["mode"] == mode]
        sizes = sorted({result["minimum_bytes"] for result in here})
        copies = [[rate for x, rate in _rates(here, COPY) if x == size] for size in sizes]
        medians = [statistics.median(rates) for rates in copies]
        axes.plot(sizes, medians, color="#555555", lw=1.5, label="plain copy")
        for name, (color, marker) in LOOKS.items():
            for dtype, fill in (("float32", color), ("bfloat16", "none")):
                points = _rates([r for r in here if r["dtype"] == dtype], name)
                x, y = zip(*points, strict=True) if points else ((), ())
                label = name if dtype == "float32" else None
                axes.plot(x, y, marker, color=color, mfc=fill, ms=5.5, label=label)
        axes.set(xscale="log", yscale="log", xlabel="bytes that must be moved")
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            subs = (1, 2, 5) if high < 300 * low else (1,)
            axis.set_major_locator(LogLocator(subs=subs, numticks=9))
            axis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: _bytes(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{_bytes(value)}/s")
        axes.tick_params(labelsize=8)
    handles = next(iter(panels.values())).get_legend_handles_labels()
    title = "filled: float32; open: bfloat16"
    figure.legend(*handles, title=title, loc="outside lower center", ncols=4)
    return _save(
        figure,
        "Bytes per second, counting only those that must be moved, beside a plain copy",
        path,
    )


def _panels(figure: Any, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a panel for each measured mode."""
    modes = [mode for mode in MODES if any(result["mode"] == mode for result in results)]
    row = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for mode, axes in zip(modes, row, strict=True):
        axes.set_title(TITLES[mode], size=10)
        axes.grid(alpha=0.3)
    return dict(zip(modes, row, strict=True))


def _save(figure: Any, title: str, path: Path) -> bool:
    figure.suptitle(title, size=11)
    figure.set_layout_engine("constrained")
    figure.savefig(path, format="png")
    return True


def _rates(results: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return bytes and bytes per second of each result."""
    sized = [(r["minimum_bytes"], r["peers"][name]) for r in results if name in r["peers"]]
    return [(size, size / measured["median"]) for size, measured in sized]


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g} B"


def _row(result: dict[str, Any]) -> str:
    return f"{result['norm']} {result['network']} {result['dtype']}"


def _headline(report: dict[str, Any]) -> str:
    lines = [f"Left of 1, jaxnorm is faster ({_device(report)})"]
    named = (("the fastest peer", None), ("Flax", "flax.linen"))
    values = [(whom, speedup(report["results"], peer)) for whom, peer in named]
    means = [f"{1 / value:.2f} times that of {whom}" for whom, value in values if value]
    return "\n".join([*lines, f"Geometric mean: jaxnorm's time is {', '.join(means)}"])


def _device(report: dict[str, Any]) -> str:
    machine = report["machine"]
    on_cpu = machine["backend"] == "cpu"
    return f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else machine["device"]
