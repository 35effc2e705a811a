"""What an audit of batch norms returns."""

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxnorm.tools.audit_sampling import LEAST
from jaxnorm.tools.programs import display_path

WIDTH = 100  # columns of the table
UNITS = (
    "effect: how far the output is from what it would be without the problem (root mean square "
    "over features and elements, before scale and bias, in standard deviations)",
    "mean difference: the largest |batch mean - running mean| / running standard deviation",
    "variance ratio: batch / running, with epsilon added to both",
)


class Finding(NamedTuple):
    """Something that is wrong with a batch norm.

    Attributes:
      path: of the norm in the model; "" is the model itself.
      problem: what is wrong, in the same words for all norms.
      advice: what to do, in one sentence.
      figures: numbers by name. "features" are those that have the problem, and "of" is how many
        there are. "mean_difference" is the largest |batch mean - running mean| / running standard
        deviation, and variance ratios are batch / running, with epsilon added to all variances.
      effect: an estimate of how much it matters: how far the norm's output is from what it would be
        without the problem, in standard deviations of that output. It is the root mean square over
        features and elements, before scale and bias; infinity where the output is not finite, NaN
        where it is unknown. Where batch and running statistics differ, it is the distance between
        the outputs of evaluation and training beyond what sampling explains.
    """

    path: str
    problem: str
    advice: str
    figures: dict[str, float]
    effect: float


class Measured(NamedTuple):
    """What was measured of a batch norm. Arrays have the shape of its running statistics.

    Attributes:
      running_mean: its running mean, in float64 (or complex).
      running_var: its running variance.
      batch_mean: the mean of its inputs; NaN where nothing counted.
      batch_var: their biased variance; NaN where nothing counted.
      count: how many elements counted.
      examples: how many examples it saw in training mode.
      distance: how far apart sampling may put the two means; NaN where that was not tested.
      lowest: how small sampling may make the batch variance; NaN where that was not tested.
      highest: how large sampling may make it; NaN where that was not tested.
      shift: how far the output of evaluation is from that of training, beyond what sampling
        explains: the root mean square over all elements, before scale and bias, in standard
        deviations; NaN where it is unknown.
      epsilon: that of the norm.
      momentum: that of the norm.
    """

    running_mean: np.ndarray
    running_var: np.ndarray
    batch_mean: np.ndarray
    batch_var: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] (tuple.count)
    examples: int
    distance: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    shift: float
    epsilon: float
    momentum: float

    @property
    def mean_difference(self) -> np.ndarray:
        """(Batch mean - running mean) / running standard deviation, with epsilon in it."""
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt(self.running_var + self.epsilon)
            return (self.batch_mean - self.running_mean) / scale

    @property
    def variance_ratio(self) -> np.ndarray:
        """Batch variance / running variance, with epsilon added to both."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.batch_var + self.epsilon) / (self.running_var + self.epsilon)

    @property
    def means_apart(self) -> np.ndarray:
        """Of which features the means are further apart than sampling explains."""
        return np.abs(self.batch_mean - self.running_mean) > self.distance

    @property
    def variances_apart(self) -> np.ndarray:
        """Of which features the variances are further apart than sampling explains."""
        return (self.batch_var < self.lowest) | (self.batch_var > self.highest)


class Findings(list[Finding]):
    """Findings, in the order in which norms are called; `print` shows them as a table.

    Attributes:
      norms: what was measured of every batch norm, by its path, also of sound ones.
      significance: the chance that a sound model has a finding by sampling alone.
    """

    def __init__(
        self, findings: Iterable[Finding], norms: dict[str, Measured], significance: float
    ):
        """What was found and measured."""
        super().__init__(findings)
        self.norms = norms
        self.significance = significance

    def __str__(self) -> str:
        return "\n".join([*_table(self), *_advice(self), *_summary(self)])


def _table(findings: Findings) -> list[str]:
    """A row for each finding: the norm, the problem and its figures."""
    if not findings:
        return []
    rows = [("batch norm", "problem", "effect", "figures")]
    rows += [
        (display_path(one.path), one.problem, _effect(one.effect), _figures(one.figures))
        for one in findings
    ]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    third = len("effect")
    margin = first + second + third + 6
    lines = []
    for norm, problem, effect, figures in rows:
        start, *rest = textwrap.wrap(figures, max(WIDTH - margin, 30)) or [""]
        lines.append(f"{norm:{first}}  {problem:{second}}  {effect:>{third}}  {start}".rstrip())
        lines += [" " * margin + line for line in rest]
    rule = f"{'-' * first}  {'-' * second}  {'-' * third}  {'-' * len('figures')}"
    return [lines[0], rule, *lines[1:], ""]


def _effect(effect: float) -> str:
    """A number, or nothing if it is unknown."""
    if np.isnan(effect):
        return ""
    return "<0.01" if effect < 0.01 else f"{effect:.2f}" if effect < 100 else f"{effect:.0e}"


def _figures(figures: dict[str, float]) -> str:
    """Numbers with their names."""
    number = lambda value: f"{value:.0f}" if value == round(value, 0) < 1e6 else f"{value:.3g}"
    texts = {name.replace("_", " "): number(value) for name, value in figures.items()}
    parts = []
    if "features" in texts:
        parts = [f"{texts.pop('features')} of {texts.pop('of')} features"]
    if "smallest variance ratio" in texts:
        ends = [texts.pop(f"{end} variance ratio") for end in ("smallest", "largest")]
        texts["variance ratio"] = " to ".join(ends)
    return ", ".join(parts + [f"{name} {text}" for name, text in texts.items()])


def _advice(findings: Findings) -> list[str]:
    """What to do, once for each problem; and what the figures are."""
    if not findings:
        return []
    advice = {finding.problem: finding.advice for finding in findings}
    texts = [f"{problem}: {text}" for problem, text in advice.items()]
    texts += UNITS[:1]
    if any("mean_difference" in finding.figures for finding in findings):
        texts += UNITS[1:]
    wrap = lambda text: textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return [line for text in texts for line in wrap(text)] + [""]


def _summary(findings: Findings) -> list[str]:
    """What was audited, and what was not tested."""
    norms = findings.norms
    number = lambda count, thing: f"{count} {thing}{'s' * (count != 1)}"
    found = number(len(findings), "finding") if findings else "No findings"
    norms_text = number(len(norms), "batch norm")
    parts = [f"{found} in {norms_text}, at significance {findings.significance:g}"]
    few = [one.examples for one in norms.values() if 0 < one.examples < LEAST]
    if few:
        parts.append(
            f"{number(len(few), 'norm')} with fewer than {LEAST} examples, too few to tell whether "
            "batch and running statistics agree"
        )
    idle = sum(not one.examples for one in norms.values())
    if idle:
        parts.append(f"{number(idle, 'norm')} frozen or not called in training mode")
    return textwrap.wrap("; ".join(parts) + ".", WIDTH)
