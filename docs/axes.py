"""Draw which elements share statistics, from the layouts of the norms themselves.

    python docs/axes.py    # writes the pictures of docs/norms

Each element is a cell with the number of its group. Cells with the same number share one mean and
variance. Each example is a panel; its rows are positions, and its columns are features.
"""

import html
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxnorm.core.layout import Layout
from jaxnorm.core.layouts import batch_layout, group_layout, instance_layout, layer_layout

GROUPS = 2  # of features, in the pictures of group norm
LAYOUTS: dict[str, Callable[[tuple[int, ...]], Layout]] = {
    "batch_norm": lambda shape: batch_layout(shape, -1),
    "layer_norm": lambda shape: layer_layout(shape, -1),
    "rms_norm": lambda shape: layer_layout(shape, -1),
    "group_norm": lambda shape: group_layout(shape, GROUPS),
    "instance_norm": lambda shape: instance_layout(shape, -1),
}
SHAPES = dict.fromkeys(LAYOUTS, (2, 3, 4)) | {"group_norm": (2, 3, 6)}
CELL, GAP, TOP, LEFT = 26, 30, 40, 14
HERE = Path(__file__).parent


def groups(layout: Layout) -> np.ndarray:
    """Return the number of each element's group: an array of the shape of x."""
    shape = layout.statistics_shape
    numbers = jnp.arange(math.prod(shape)).reshape(shape)
    return np.broadcast_to(np.asarray(layout.broadcast_statistics(numbers)), layout.shape)


def shares(name: str) -> dict[str, bool]:
    """Return whether examples, positions and features share statistics."""
    numbers = groups(LAYOUTS[name](SHAPES[name]))
    differ = {"examples": (1, 0, 0), "positions": (0, 1, 0), "features": (0, 0, 1)}
    return {axis: bool(numbers[place] == numbers[0, 0, 0]) for axis, place in differ.items()}


def picture(name: str, shape: tuple[int, ...] | None = None) -> str:
    """Return an SVG with the classes of site.css. axes.js draws the same for other shapes."""
    shape = SHAPES[name] if shape is None else shape
    numbers = groups(LAYOUTS[name](shape)).reshape(shape[0], -1, shape[-1])
    examples, positions, features = numbers.shape
    width, height = features * CELL, positions * CELL
    parts = []
    for example in range(examples):
        left = LEFT + example * (width + GAP)
        parts.append(f'<text x="{left}" y="{TOP - 10}">example {example}</text>')
        for (row, column), number in np.ndenumerate(numbers[example]):
            x, y = left + column * CELL, TOP + row * CELL
            parts.append(
                f'<rect class="c{number % 8}" x="{x}" y="{y}" width="{CELL - 2}" '
                f'height="{CELL - 2}"/><text class="n" x="{x + CELL / 2 - 1:g}" '
                f'y="{y + CELL / 2 + 3:g}">{number}</text>'
            )
    total = LEFT + examples * (width + GAP)
    label = html.escape(f"{name}, x of shape {shape}: cells of one number share statistics")
    return (
        f'<svg class="axes" role="img" aria-label="{label}" viewBox="0 0 {total} '
        f'{TOP + height + 24}" width="{total}">{"".join(parts)}'
        f'<text x="{LEFT}" y="{TOP + height + 16}">rows: positions, columns: features</text></svg>'
    )


def file(name: str) -> str:
    """Return the picture as the text of a file, with the colours of site.css."""
    colors = re.findall(r"--g(\d): (#\w+)", (HERE / "_static" / "site.css").read_text())
    cells = "".join(f".c{number}{{fill:{color}}}" for number, color in colors)
    # Gray is legible on white and on black; the numbers are on the cells' colours.
    style = f"text{{font:12px sans-serif;fill:#808080}}{cells}"
    style += ".n{font-size:10px;text-anchor:middle;fill:#1a1a1a}"
    svg = picture(name).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return svg.replace(">", f"><style>{style}</style>", 1).replace("<rect", "\n<rect") + "\n"


def summary(name: str, layout: Layout) -> str:
    """Return the number of statistics and of the elements in each, in words, as axes.js does."""
    count = math.prod(layout.statistics_shape)
    size = math.prod(layout.shape) // count
    one = "mean square" if name == "rms_norm" else "mean"
    means = f"{count} {one}{'' if count == 1 else 's'}, each of "
    if size > 1:
        return f"{means}{size} elements"
    result = "only the sign of x is left" if name == "rms_norm" else "the result is the bias"
    return f"{means}1 element: {result}"


def widget(name: str) -> str:
    """Return the picture, with input fields for the shape and the number of groups."""
    axes = " ".join(axis for axis, shared in shares(name).items() if shared)
    shape = ", ".join(map(str, SHAPES[name]))
    field = '<label>{}: <input class="{}" value="{}" size="{}" spellcheck="false"></label> '
    fields = field.format("shape of x", "shape", shape, 12)
    if name == "group_norm":
        fields += field.format("num_groups", "groups", GROUPS, 3)
    return (
        f'<div class="axes-widget" data-norm="{name}" data-shares="{axes}">'
        f'<div class="picture">{picture(name)}</div>{fields}'
        f"<output>{summary(name, LAYOUTS[name](SHAPES[name]))}</output></div>"
    )


if __name__ == "__main__":
    for name in LAYOUTS:
        (HERE / "norms" / f"{name}.svg").write_text(file(name))
