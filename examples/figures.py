"""The style of the examples' figures: colours of the norms, smoothed curves, saving."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from storage import replacing


class Look(NamedTuple):
    """The name and the plot style of a norm."""

    name: str
    color: str  # from the palette of Okabe and Ito, which is safe for colour-blind readers
    marker: str


LOOKS = {
    "none": Look("no norm", "#000000", "X"),
    "batch": Look("batch norm", "#D55E00", "o"),
    "layer": Look("layer norm", "#0072B2", "s"),
    "group": Look("group norm", "#009E73", "^"),
    "instance": Look("instance norm", "#CC79A7", "D"),
    "rms": Look("rms norm", "#E69F00", "v"),
}


def curve(histories: Iterable[list[dict[str, float]]], key: str = "loss", points: int = 60):
    """Steps and means over equal parts of the runs, averaged over runs of equal length."""
    values = np.mean([[line[key] for line in history] for history in histories], axis=0)
    parts = np.array_split(np.arange(len(values)), min(points, len(values)))
    return [part.mean() + 1 for part in parts], [values[part].mean() for part in parts]


def save_figure(figure: Figure, path: Path) -> None:
    """Save a figure, with grids and without frames."""
    for axes in figure.axes:
        if axes.axison:
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15)
