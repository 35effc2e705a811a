"""The figure of an audit; it needs matplotlib."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

from jaxnorm.tools.findings import Findings, NormMeasurements
from jaxnorm.tools.programs import display_path

# From the palette of Okabe and Ito, which is safe for colour-blind readers.
SOUND, APART, EXPLAINED, MARKED = "#444444", "#D55E00", "#56B4E9", "#FBE9C6"
ROW = 0.24  # inches
TALL = 20  # norms; for more, the axes have numbers at the top too
LINEAR = 4  # running standard deviations; for more, the axis of the means is logarithmic beyond 1
LIMIT = 1e6  # larger ratios are drawn here


def draw(findings: Findings) -> Figure:
    """Draw a row for each norm: the means on the left, the variances on the right."""
    norms = list(findings.norms.items())
    wrong = {finding.path for finding in findings}
    figure = Figure(figsize=(11, ROW * len(norms) + 2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    right.set_xscale("log")
    for row, (path, norm) in enumerate(norms):
        if path in wrong:
            for axes in (left, right):
                axes.axhspan(row - 0.5, row + 0.5, color=MARKED, lw=0, zorder=0.5)
        _draw_norm(left, right, row, norm)
    _scale_means(left, [norm for _, norm in norms])
    _scale_ratios(right, [norm for _, norm in norms])
    left.set_yticks(range(len(norms)), [display_path(path) for path, _ in norms], size=8)
    for label, (path, _) in zip(left.get_yticklabels(), norms, strict=True):
        label.set_weight("bold" if path in wrong else "normal")
    left.set_ylim(len(norms) - 0.5, -0.5)
    for axes in (left, right):
        axes.tick_params(axis="x", labeltop=len(norms) > TALL)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    stroke = {"marker": "|", "ls": "", "ms": 10, "mew": 1.2}
    handles = [
        Line2D([], [], color=SOUND, label="a feature", **stroke),
        Line2D([], [], color=APART, label="further apart than sampling explains", **stroke),
        Patch(color=EXPLAINED, alpha=0.45, lw=0, label="explained by sampling (median feature)"),
        Patch(color=MARKED, lw=0, label="norm with a finding"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        f"Batch statistics against running statistics, in the order of calls: {len(wrong)} of "
        f"{len(norms)} batch norms with findings",
        size=10,
    )
    return figure


def _draw_norm(left: Any, right: Any, row: int, norm: NormMeasurements) -> None:
    """Draw a stroke for each feature, and a box for the range that sampling explains."""
    difference = norm.mean_difference
    difference = np.abs(difference) if np.iscomplexobj(difference) else difference
    ratio = _ratio(norm)
    if not (np.isfinite(difference) & np.isfinite(ratio)).any():
        text = "not finite" if norm.examples else "frozen, or not called in training mode"
        for axes in (left, right):
            where = {"x": 0.5, "y": row, "transform": axes.get_yaxis_transform()}
            axes.text(s=text, ha="center", va="center", size=8, **where)
        return
    for axes, values, apart in (
        (left, difference, norm.means_apart),
        (right, ratio, norm.variances_apart),
    ):
        for features, color, width in ((~apart, SOUND, 0.9), (apart, APART, 1.5)):
            chosen = values[features & np.isfinite(values)]
            stroke = {"color": color, "ms": 9, "mew": width, "alpha": 0.8, "rasterized": True}
            axes.plot(chosen, np.full(chosen.shape, row), "|", **stroke)
    if np.isnan(norm.distance).all():
        return
    scale = norm.running_var + norm.epsilon
    limit = np.nanmedian(norm.distance / np.sqrt(scale))
    ends = [np.nanmedian((end + norm.epsilon) / scale) for end in (norm.lowest, norm.highest)]
    for axes, (low, high) in ((left, (-limit, limit)), (right, np.clip(ends, 1 / LIMIT, LIMIT))):
        box = {"color": EXPLAINED, "alpha": 0.45, "lw": 0, "zorder": 0.9}
        axes.barh(row, high - low, 0.8, left=low, **box)


def _ratio(norm: NormMeasurements) -> np.ndarray:
    return np.clip(norm.variance_ratio, 1 / LIMIT, LIMIT)


def _scale_means(axes: Any, norms: list[NormMeasurements]) -> None:
    """Set a linear scale, or one that is logarithmic for large differences."""
    largest = np.max(_finite(np.abs(norm.mean_difference) for norm in norms), initial=0)
    label = "batch mean - running mean, in running standard deviations"
    if largest > LINEAR:
        axes.set_xscale("symlog", linthresh=1, linscale=0.7)
        last = int(np.ceil(np.log10(largest)))
        powers = 10.0 ** np.arange(0, last + 1, 1 + last // 4)
        axes.xaxis.set_major_locator(FixedLocator([*-powers[::-1], 0, *powers]))
        label += "\n(logarithmic beyond 1)"
    axes.axvline(0, color="black", lw=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label, size=9)


def _scale_ratios(axes: Any, norms: list[NormMeasurements]) -> None:
    """Set a logarithmic scale with plain numbers."""
    ratios = _finite(map(_ratio, norms))
    low, high = np.min(ratios, initial=0.5) / 1.2, np.max(ratios, initial=2) * 1.2
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("batch variance / running variance (logarithmic)", size=9)


def _finite(arrays: Iterable[np.ndarray]) -> np.ndarray:
    values = np.concatenate([array.ravel() for array in arrays])
    return values[np.isfinite(values)]
