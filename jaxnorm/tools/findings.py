"""The result of an audit of batch norms."""

import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxnorm.tools.audit_sampling import MIN_EXAMPLES
from jaxnorm.tools.programs import display_path

WIDTH = 100  # columns of the table
UNITS = (
    "effect: how far the output is from what it would be without the problem (root mean square "
    "over features and elements, before scale and bias, in standard deviations)",
    "mean difference: the largest |batch mean - running mean| / running standard deviation",
    "variance ratio: batch / running, with epsilon added to both",
)


class Finding(NamedTuple):
    """A problem of a batch norm.

    Attributes:
      path: the path of the norm in the model; "" is the model itself.
      problem: what is wrong, in the same words for all norms.
      advice: what to do, in one sentence.
      figures: numbers by name. "features" is the number of features that have the problem, "of" the
        number of all features. "mean_difference" is the largest |batch mean - running mean| /
        running standard deviation. Variance ratios are batch / running. Epsilon is added to all
        variances.
      effect: an estimate of how much the problem matters: the distance of the norm's output from
        the output without the problem, in standard deviations of that output. It is the root mean
        square over features and elements, before scale and bias; infinity if the output is not
        finite, NaN if it is unknown. If batch and running statistics differ, it is the distance
        between the outputs of evaluation and training that sampling does not explain.
    """

    path: str
    problem: str
    advice: str
    figures: dict[str, float]
    effect: float


class NormMeasurements(NamedTuple):
    """The measurements of a batch norm. Arrays have the shape of its running statistics.

    Attributes:
      running_mean: its running mean, in float64 (or complex).
      running_var: its running variance.
      batch_mean: the mean of its inputs; NaN if no element counted.
      batch_var: their biased variance; NaN if no element counted.
      count: the number of elements that counted.
      examples: the number of examples in training mode.
      distance: the largest distance of the two means that sampling explains; NaN if not tested.
      lowest: the lowest batch variance that sampling explains; NaN if not tested.
      highest: the highest batch variance that sampling explains; NaN if not tested.
      shift: the distance between the outputs of evaluation and training that sampling does not
        explain: the root mean square over all elements, before scale and bias, in standard
        deviations; NaN if it is unknown.
      epsilon: the epsilon of the norm.
      momentum: the momentum of the norm.
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
        """(Batch mean - running mean) / running standard deviation, which includes epsilon."""
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
        """The features whose means differ by more than sampling explains."""
        return np.abs(self.batch_mean - self.running_mean) > self.distance

    @property
    def variances_apart(self) -> np.ndarray:
        """The features whose variances differ by more than sampling explains."""
        return (self.batch_var < self.lowest) | (self.batch_var > self.highest)


class Findings(list[Finding]):
    """Findings, in the order in which norms are called; `print` shows them as a table.

    Attributes:
      norms: the measurements of all batch norms by path, sound ones too.
      significance: the chance that a sound model has a finding by sampling alone.
    """

    def __init__(
        self, findings: Iterable[Finding], norms: dict[str, NormMeasurements], significance: float
    ):
        """Store the findings and the measurements."""
        super().__init__(findings)
        self.norms = norms
        self.significance = significance

    def __str__(self) -> str:
        return "\n".join([*_table(self), *_advice(self), *_summary(self)])


def _table(findings: Findings) -> list[str]:
    """Return a row for each finding: the norm, the problem and its figures."""
    if not findings:
        return []
    rows = [("batch norm", "problem", "effect", "figures")]
    rows += [
        (
            display_path(finding.path),
            finding.problem,
            _effect(finding.effect),
            _figures(finding.figures),
        )
        for finding in findings
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
    """Return the effect as text, which is empty if the effect is unknown."""
    if np.isnan(effect):
        return ""
    return "<0.01" if effect < 0.01 else f"{effect:.2f}" if effect < 100 else f"{effect:.0e}"


def _figures(figures: dict[str, float]) -> str:
    """Return numbers with their names as text."""
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
    """Return the advice on each problem once, and the meaning of the figures."""
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
    """Return a sentence on the norms that were audited and those that were not tested."""
    norms = findings.norms
    number = lambda n, thing: f"{n} {thing}{'s' * (n != 1)}"
    count = number(len(findings), "finding") if findings else "No findings"
    norms_text = number(len(norms), "batch norm")
    parts = [f"{count} in {norms_text}, at significance {findings.significance:g}"]
    untested = sum(0 < norm.examples < MIN_EXAMPLES for norm in norms.values())
    if untested:
        parts.append(
            f"{number(untested, 'norm')} with fewer than {MIN_EXAMPLES} examples, too few to test "
            "whether batch and running statistics agree"
        )
    not_called = sum(not norm.examples for norm in norms.values())
    if not_called:
        parts.append(f"{number(not_called, 'norm')} frozen or not called in training mode")
    return textwrap.wrap("; ".join(parts) + ".", WIDTH)
