"""The picture of docs/devices.md; `python docs/devices.py --write` draws it."""

from pathlib import Path
from typing import Any

from devices import CALCULATED, MEASURED, bytes_sent, calculated, compiled

WIDTHS = (64, 256, 2048)  # numbers of features
# From the palette of Okabe and Ito, which is safe for colour-blind readers.
LOOKS = {"jaxnorm": ("#D55E00", "-"), "Flax": ("#000000", "--")}
DEVICES = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7")
CAPTION = """\
C features; $\\hat{x}$ is the normalized x; high + low is the mean to twice the precision.
With a mask each device also sends its counts: 4C numbers."""


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
        """Draw a label on the left, and for each device a row of boxes with texts."""
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
    boxes(20.8, "Σ dy", "Σ dy·$\\hat{x}$", words="each sums up\nits own part")
    exchange(15.8, "backward: one all-reduce, 2C numbers from each")
    shards(9.4, "dx: the gradient\nof x")
    axes.text(0, 0, CAPTION, linespacing=1.5)
    axes.set(xlim=(-0.5, 61), ylim=(-1, 60), title="One step of batch norm on four devices")
    axes.axis("off")


def draw_bytes(axes: Any) -> None:
    """Lines are calculated; dots are from the compiled programs."""
    counts = range(2, CALCULATED[-1] + 1)
    for features in WIDTHS:
        for library, (color, line) in LOOKS.items():
            sent = [bytes_sent(calculated(library, features, devices)) for devices in counts]
            axes.loglog(counts, sent, line, color=color, lw=1.6)
            sent = [bytes_sent(compiled(library, features, devices)) for devices in MEASURED]
            axes.loglog(MEASURED, sent, "o", color=color, ms=4)
        axes.text(1.15 * counts[-1], 36 * features, f"C = {features:,}", va="center", size=9)
    axes.text(2, 5e5, "jaxnorm", color=LOOKS["jaxnorm"][0], weight="bold")
    axes.text(2, 2.4e4, "Flax", color=LOOKS["Flax"][0], weight="bold")
    axes.text(50, 5e5, "at each peak: from\na table to sums", size=9)
    axes.set_xticks(ticks := (2, 8, 64, 512, 4096), [f"{tick:,}" for tick in ticks])
    axes.set_yticks([10**k for k in range(3, 7)], ["1 kB", "10 kB", "100 kB", "1 MB"])
    axes.minorticks_off()
    axes.set(xlim=(1.8, 4600), ylim=(700, 2e6), xlabel="devices")
    axes.set_title("Bytes that each device sends per step\n(lines: calculated; dots: compiled)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
