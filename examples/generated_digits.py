"""Scores and pictures of generated digits."""

from pathlib import Path

import numpy as np
from figures import save_figure
from image_datasets import Labelled, load_dataset
from matplotlib.figure import Figure
from sklearn.svm import SVC

CLASSES, PIXELS = 10, 64
ROWS = 8  # in a sheet of digits


class Examiner:
    """Two classifiers tell how good generated digits are; `train` and `test` are real ones.

    One was trained on real digits and classifies the generated ones (one good picture for each
    class would be enough for a high score). One is trained on the generated digits and classifies
    the real ones (it would not be enough).
    """

    def __init__(self):
        """Train the classifier of real digits."""
        real = load_dataset("digits")
        self.train, self.test = (Labelled(x.reshape(-1, PIXELS), y) for x, y in real)
        self.expert = SVC().fit(*self.train)
        score = self.expert.score(*self.test)
        print(f"accuracy of the classifier trained on real digits: {score:.3f}")

    def scores(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the accuracies on generated digits, and after learning from them."""
        learner = SVC().fit(images, labels)
        return {
            "generated_recognized": float(self.expert.score(images, labels)),
            "real_recognized": float(learner.score(*self.test)),
        }

    def real_sheet(self) -> np.ndarray:
        """Real digits of all classes in turn, to be drawn."""
        images, labels = self.test
        by_class = [images[labels == label][:ROWS] for label in range(CLASSES)]
        return np.stack(by_class, 1).reshape(-1, PIXELS)


def describe(rows: list[dict]) -> str:
    """Return the mean scores of some runs, as two lines of a title."""
    keys = ("generated_recognized", "real_recognized")
    first, second = (100 * np.mean([row[key] for row in rows]) for key in keys)
    return f"{first:.1f} % recognized; real digits by\na learner of these: {second:.1f} %"


def draw_sheets(path: Path, sheets: dict[str, np.ndarray]) -> None:
    """Draw a sheet of digits below each title, a column for each class."""
    figure = Figure((2.6 * len(sheets), 3.4), layout="constrained")
    for axes, (title, images) in zip(figure.subplots(1, len(sheets)), sheets.items(), strict=True):
        grid = np.zeros((ROWS * 9 + 1, CLASSES * 9 + 1))  # with dark lines between the digits
        for index, image in enumerate(images[: ROWS * CLASSES]):
            row, column = divmod(index, CLASSES)
            grid[row * 9 + 1 : row * 9 + 9, column * 9 + 1 : column * 9 + 9] = image.reshape(8, 8)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1)
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
    save_figure(figure, path)
