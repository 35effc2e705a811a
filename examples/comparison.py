"""The runs of a comparison of norms: files, ranking, table, conclusions and figure."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import LOOKS
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from scipy.stats import t
from storage import UserError, replacing

CURVE_POINTS = 40  # of the stored training loss: means over equal parts of a run


class Run(NamedTuple):
    """One training run: a row of runs.csv. Accuracies are fractions."""

    norm: str
    batch_size: int
    seed: int
    dataset: str
    device: str
    recipe: int
    learning_rate: float
    steps: int
    test_accuracy: float
    train_accuracy: float  # on the same number of training images as test images
    # On the test images: accuracy with the norm in training mode, in batches of the training's
    # size, minus test_accuracy, which is with the norm in evaluation mode.
    train_eval_gap: float
    final_loss: float  # the last point of the losses
    ms_per_step: float  # of training only, without compilation
    losses: str  # the training loss, CURVE_POINTS numbers

    def curve(self) -> np.ndarray:
        """Return the training loss over the run."""
        return np.array([float(loss) for loss in self.losses.split()])


def write_runs(path: Path, runs: Iterable[Run]) -> None:
    """Write runs to a CSV file."""
    with replacing(path) as unfinished, open(unfinished, "w", newline="") as file:
        csv.writer(file).writerows([Run._fields, *runs])


def read_runs(path: Path) -> list[Run]:
    """Read the file of write_runs; return an empty list if there is none."""
    if not path.exists():
        return []
    kinds = Run.__annotations__.values()
    try:
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        if tuple(header) != Run._fields:
            raise ValueError("its first line does not name the columns")
        runs = [Run(*(kind(x) for kind, x in zip(kinds, row, strict=True))) for row in rows]
        for run in runs:
            whole = len(run.curve()) == min(CURVE_POINTS, run.steps)
            sound = 0 <= run.test_accuracy <= 1 and 0 <= run.train_accuracy <= 1
            if run.norm not in LOOKS or run.batch_size < 1 or not whole or not sound:
                raise ValueError(f"{run.norm}, {run.batch_size}, {run.seed} is not a complete run")
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} must be a file of this program, but is damaged ({error}): delete it to start "
            "again, or choose another --out"
        ) from error
    return runs


class Study(NamedTuple):
    """The runs of each norm at each batch size, ordered by seed."""

    norms: list[str]
    sizes: list[int]
    seeds: int
    cells: dict[tuple[str, int], list[Run]]

    @property
    def ends(self) -> list[int]:
        """The smallest and the largest batch size."""
        return sorted({min(self.sizes), max(self.sizes)})

    def column(self, norm: str, size: int, name: str = "test_accuracy") -> np.ndarray:
        """Return one column of the runs; accuracies and their differences in percent."""
        scale = 1 if name == "ms_per_step" else 100
        return scale * np.array([getattr(run, name) for run in self.cells[norm, size]])

    def show(self, norm: str, size: int) -> str:
        """Return the mean test accuracy and, for several seeds, the standard deviation."""
        points = self.column(norm, size)
        return f"{points.mean():.1f}" + (f" ± {points.std(ddof=1):.1f}" if self.seeds > 1 else "")

    def rank(self, size: int, norms: Sequence[str]) -> tuple[str, list[str]]:
        """Return the norm with the best mean, and the norms within the noise of it.

        A norm is within the noise if the 95 % interval (Student's t) of its difference to the
        best norm, paired by seed, contains zero.
        """
        best = max(norms, key=lambda norm: self.column(norm, size).mean())
        near = []
        for norm in norms:
            behind = self.column(best, size) - self.column(norm, size)
            noise = 0.0
            if self.seeds > 1:
                noise = t.ppf(0.975, self.seeds - 1) * behind.std(ddof=1) / self.seeds**0.5
            if norm != best and behind.mean() <= noise:
                near.append(norm)
        return best, near


TABLE = """
batch size  norm             test accuracy %  train - test  train/eval gap  ms/step
{lines}

Means ± standard deviation over the seeds ({seeds}); ms/step is the median, without compilation.
* best mean at this batch size; ~ within the noise of it: the 95 % interval (Student's t) of the
difference, paired by seed, contains zero. Train/eval gap: accuracy on the test images with the norm
in training mode, in batches as in training, minus that in evaluation mode. Differences are in
points.
"""


def tabulate(study: Study) -> str:
    """Return a table with a line for each norm at each batch size."""
    lines = []
    for size in study.sizes:
        best, near = study.rank(size, study.norms)
        lines.append("")
        for norm in study.norms:
            mark = "*" if norm == best else "~" if norm in near else " "
            train = study.column(norm, size, "train_accuracy") - study.column(norm, size)
            gap = study.column(norm, size, "train_eval_gap")
            ms = np.median(study.column(norm, size, "ms_per_step"))
            lines.append(
                f"{size:10}  {LOOKS[norm].name:13} {mark}  {study.show(norm, size):15}"
                f"{train.mean():+14.1f}{gap.mean():+16.1f}{ms:9.3f}"
            )
    return TABLE.format(lines="\n".join(lines), seeds=study.seeds)


def listed(items: Iterable[str | int]) -> str:
    """Return "a, b and c", or "none"."""
    *front, last = [str(item) for item in items] or ["none"]
    return f"{', '.join(front)} and {last}" if front else last


def named(norms: Iterable[str]) -> str:
    """Return the names of norms as text."""
    return listed(LOOKS[norm].name for norm in norms)


def conclude(study: Study) -> list[str]:
    """Describe the results of the runs."""
    norms, sizes, ends = study.norms, study.sizes, study.ends
    said = []
    for size in sizes:
        best, near = study.rank(size, norms)
        steps = study.cells[best, size][0].steps
        line = f"Batch size {size}, {steps} steps: "
        line += f"{LOOKS[best].name} gives {study.show(best, size)} %"
        if len(norms) > 1:
            line += ", the best mean"
        if len(norms) > 1 and study.seeds > 1:
            line += f"; within the noise of it: {named(near)}"
        said.append(f"{line}.")
    at = f"at batch size {' to '.join(map(str, ends))}"
    if "batch" in norms:
        accuracies = [study.show("batch", size) for size in ends]
        gaps = [f"{study.column('batch', size, 'train_eval_gap').mean():+.1f}" for size in ends]
        said.append(
            f"Batch norm {at}: {' to '.join(accuracies)} %, with a train/eval gap of "
            f"{' to '.join(gaps)} points."
        )
    others = [norm for norm in norms if norm != "batch"]
    if others:
        gaps = [study.column(norm, size, "train_eval_gap") for norm in others for size in sizes]
        said.append(f"Largest train/eval gap of {named(others)}: {np.abs(gaps).max():.1f} points.")
    rivals = [norm for norm in norms if norm != "none"]
    if "none" in norms and rivals:
        best = [study.column(study.rank(size, rivals)[0], size).mean() for size in ends]
        none = [study.column("none", size).mean() for size in ends]
        behind = [f"{points:.1f}" for points in np.subtract(best, none)]
        said.append(f"No norm {at}: {' to '.join(behind)} points less than the best norm.")
    if study.seeds == 1:
        said.append("With one seed, a difference can't be distinguished from noise: no advice.")
        return said
    if len(norms) > 1:
        said.append(f"Based on these runs, use {advise(study, norms)}.")
    if "batch" in norms and len(others) > 1:
        said.append(f"If the images of a batch must not mix, use {advise(study, others)}.")
    return said


def advise(study: Study, norms: Sequence[str]) -> str:
    """Name norms that are best or within the noise at each batch size, as few as possible."""
    good = {size: (best, *near) for size in study.sizes for best, near in [study.rank(size, norms)]}
    advice = []

    def worth(norm: str) -> tuple[int, float]:
        covered = [size for size in good if norm in good[size]]
        return len(covered), sum(study.column(norm, size).mean() for size in covered)

    while good:
        norm = max(norms, key=worth)
        sizes = [size for size, names in good.items() if norm in names]
        advice.append(f"{LOOKS[norm].name} at batch size {listed(sizes)}")
        good = {size: names for size, names in good.items() if size not in sizes}
    return ", ".join(advice)


def draw(study: Study, dataset: str, path: Path) -> None:
    """Draw accuracy against batch size, and the loss curves of the smallest and the largest."""
    norms, sizes, ends = study.norms, study.sizes, study.ends
    layout = ConstrainedLayoutEngine(wspace=0.06)
    figure = Figure(figsize=(11, 4.8), dpi=150, layout=layout)
    left, *others = figure.subplots(1, 1 + len(ends), width_ratios=[1.6] + [1] * len(ends))
    for axes in others[1:]:
        axes.sharey(others[0])
    for place, norm in enumerate(norms):
        style = {"color": LOOKS[norm].color, "linewidth": 1.7}
        accuracy = [study.column(norm, size) for size in sizes]
        apart = 2 ** (0.09 * (place - (len(norms) - 1) / 2))  # so the error bars do not overlap
        left.errorbar(
            [apart * size for size in sizes],
            [points.mean() for points in accuracy],
            [points.std(ddof=min(1, study.seeds - 1)) for points in accuracy],
            marker=LOOKS[norm].marker,
            elinewidth=1,
            label=LOOKS[norm].name,
            **style,
        )
        for axes, size in zip(others, ends, strict=True):
            runs = study.cells[norm, size]
            curve = np.mean([run.curve() for run in runs], axis=0)
            images = (np.arange(len(curve)) + 0.5) / len(curve) * runs[0].steps * size
            axes.semilogy(images / 1000, curve, **style)
            axes.set(xlabel="images seen (thousands)", title=f"batch size {size}, smoothed")
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, map(str, sizes))
    left.set(
        xlabel="batch size (markers are set apart sideways)",
        ylabel="test accuracy (%)",
        title=f"{dataset}, mean ± s.d. (seeds: {study.seeds})",
    )
    others[0].set_ylabel("training loss (cross-entropy)")
    for axes in (left, *others):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(norms), frameon=False)
    finding = f"\nBest mean, or within the noise of it: {advise(study, norms)}"
    figure.suptitle(f"Which norm at which batch size?{finding if study.seeds > 1 else ''}")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")
