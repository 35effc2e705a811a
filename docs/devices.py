"""What the devices send each other: from the compiled programs, and by calculation.

    python docs/devices.py            prints the table
    python docs/devices.py --write    also updates docs/devices.md and docs/devices.png

It takes about 10 seconds on two CPU cores, and 35 with --write.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm.linen
from benchmarks.collectives import Collective, collectives
from jaxnorm.core.devices import LARGEST_TABLE

HERE = Path(__file__).parent
NORMS: dict[str, Any] = {"jaxnorm": jaxnorm.linen.BatchNorm, "Flax": nn.BatchNorm}
FEATURES = 256  # in the table
MEASURED = range(2, 9)  # numbers of devices to compile for
CALCULATED = (16, 64, 256, 1024, 4096)
# From the palette of Okabe and Ito, which is safe for colour-blind readers.
LOOKS = {"jaxnorm": ("#D55E00", "-"), "Flax": ("#000000", "--")}
DEVICES = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
CAPTION = """\
C features; h is the normalized x; high + low is the mean to twice the precision.
With a mask each device also sends its counts: 4C numbers."""


def compiled(library: str, features: int, devices: int) -> list[Collective]:
    """The collectives of one training step of batch norm: forward, and the gradient of x."""
    module = NORMS[library](use_running_average=False, axis_name="data")
    variables = module.init(jax.random.key(0), jnp.zeros((1, features)))
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    apply = lambda x: module.apply(variables, x, mutable=["batch_stats"])
    norm = jax.shard_map(apply, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))

    def loss(x):
        y, state = norm(x)
        return jnp.sum(jnp.sin(y)), state

    x = jax.ShapeDtypeStruct((2 * devices, features), jnp.float32)
    return collectives(jax.grad(loss, has_aux=True), x)


def calculated(library: str, features: int, devices: int) -> list[Collective]:
    """The same collectives, calculated for any number of devices."""

    def exchange(kind, times):
        return Collective(kind, times * features, 4 * times * features, devices)

    backward = exchange("all-reduce", 2)  # sums of dy and of dy times the standardized x
    if library == "Flax":
        return [exchange("all-reduce", 2), backward]  # means of x and of its square
    table = exchange("all-gather", 3)  # mean (high and low part) and variance
    if table.bytes * devices <= LARGEST_TABLE:
        return [table, backward]
    # The sum of the means; then the sums of their low parts and of the squares.
    return [exchange("all-reduce", 1), exchange("all-reduce", 2), backward]


def bytes_sent(exchanges: list[Collective]) -> float:
    """Bytes that each device sends."""
    return sum(exchange.bytes_sent for exchange in exchanges)


def table(exchanges: Any = calculated) -> str:
    """The Markdown table, calculated or with the collectives that another function returns."""
    libraries = [f"{library}: collectives | bytes sent" for library in NORMS]
    lines = [f"| devices | source | {' | '.join(libraries)} |", "|---:|---" + "|---:" * 4 + "|"]
    for devices in (*MEASURED, *CALCULATED):
        cells = [f"{devices:,}", "compiled" if devices in MEASURED else "calculated"]
        for library in NORMS:
            found = exchanges(library, FEATURES, devices)
            cells += [str(len(found)), f"{bytes_sent(found):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def committed(page: str) -> str:
    """The table in the page."""
    _, _, rest = page.partition("<!-- table -->\n")
    return rest.partition("\n<!-- end of table -->")[0]


def draw(path: Path) -> None:
    """Draw what the devices exchange, and how many bytes that is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.66, 6.3), dpi=150)
    draw_exchange(figure.add_axes((0.01, 0.01, 0.6, 0.9)))
    draw_bytes(figure.add_axes((0.675, 0.09, 0.24, 0.82)))
    figure.savefig(path, format="png")


def draw_exchange(axes: Any) -> None:
    """Four devices: what each has, sends and receives."""
    from matplotlib.patches import Rectangle

    centers = [20.3 + 11.6 * device for device in range(4)]

    def boxes(y, *texts, words="", colors=DEVICES, height=2.5, width=11):
        """A label on the left, and for each device a row of boxes with texts."""
        axes.text(0, y, words, va="center", linespacing=1.3)
        size = width / len(texts)
        for center, color in zip(centers, colors, strict=True):
            for place, text in enumerate(texts):
                x = center - width / 2 + size * place
                box = Rectangle((x, y - height / 2), size, height, fc=color, ec="white", lw=1)
                axes.add_patch(box)
                axes.text(x + size / 2, y, text, ha="center", va="center", size=8.5)

    def shards(y, words):
        for up in (1.6, 0, -1.6):
            boxes(y + up, *[""] * 4, words="" if up else words, height=1.6, width=8)

    def exchange(y, words):
        axes.add_patch(Rectangle((14.8, y - 1.5), 45.8, 3, fc="#333333"))
        axes.text(37.7, y, words, color="white", ha="center", va="center", weight="bold")
        arrows(y + 3.6)
        arrows(y - 1.6)

    def arrows(y):
        for x in centers:
            axes.annotate("", (x, y - 2), (x, y), arrowprops={"arrowstyle": "-|>", "fc": "k"})

    for device, x in enumerate(centers):
        axes.text(x, 57.5, f"device {device}", ha="center")
    shards(54, "x: a part of the\nbatch on each")
    arrows(51.4)
    boxes(47.9, "high", "low", "var", words="each measures\nits own part")
    exchange(42.9, "forward: one all-gather, 3C numbers from each")
    for sender, color in enumerate(DEVICES):
        boxes(38.3 - 1.5 * sender, *[""] * 3, colors=[color] * 4, height=1.5)
    axes.text(0, 36, "all get the same\ntable, and merge\nit in the same way", va="center")
    arrows(32.3)
    shards(27.7, "y: normalized by\nthe whole batch")
    axes.plot([0, 60.6], [23.6, 23.6], color="#999999", lw=1, ls="--")
    boxes(20.8, "Σ dy", "Σ dy·h", words="each sums up\nits own part")
    exchange(15.8, "backward: one all-reduce, 2C numbers from each")
    shards(9.4, "dx: the gradient\nof x")
    axes.text(0, 0, CAPTION, linespacing=1.5)
    axes.set(xlim=(-0.5, 61), ylim=(-1, 60), title="One step of batch norm on four devices")
    axes.axis("off")


def draw_bytes(axes: Any) -> None:
    """Lines are calculated; dots are from the compiled programs."""
    counts = range(2, CALCULATED[-1] + 1)
    for features in (64, 256, 2048):
        for library, (color, line) in LOOKS.items():
            sent = [bytes_sent(calculated(library, features, devices)) for devices in counts]
            axes.loglog(counts, sent, line, color=color, lw=1.6)
            sent = [bytes_sent(compiled(library, features, devices)) for devices in MEASURED]
            axes.loglog(MEASURED, sent, "o", color=color, ms=4)
        axes.text(1.15 * counts[-1], 36 * features, f"C = {features:,}", va="center", size=9)
    axes.text(2, 5e5, "jaxnorm", color=LOOKS["jaxnorm"][0], weight="bold")
    axes.text(2, 2.4e4, "Flax", color=LOOKS["Flax"][0], weight="bold")
    axes.axhline(LARGEST_TABLE, color="#999999", lw=1, ls=":")
    axes.text(2, 1.2 * LARGEST_TABLE, "a table of 1 MiB: beyond it, sums", size=9)
    axes.set_xticks(ticks := (2, 8, 64, 512, 4096), [f"{tick:,}" for tick in ticks])
    axes.set_yticks([10**k for k in range(3, 7)], ["1 kB", "10 kB", "100 kB", "1 MB"])
    axes.minorticks_off()
    axes.set(xlim=(1.8, 4600), ylim=(700, 3e6), xlabel="devices")
    axes.set_title("Bytes that each device sends per step\n(lines: calculated; dots: compiled)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the devices of a batch norm exchange.")
    parser.add_argument("--write", action="store_true", help="also write docs/devices.md and .png")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MEASURED[-1])
    rows = table(lambda *case: (compiled if case[-1] in MEASURED else calculated)(*case))
    print(rows)
    if arguments.write:
        page, new = (HERE / "devices.md").read_text(), HERE / "devices.new"
        new.write_text(page.replace(committed(page), rows))
        os.replace(new, HERE / "devices.md")
        draw(new)
        os.replace(new, HERE / "devices.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
