"""Find what is wrong with the batch norms of a model: on the host, without Flax."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.tools.audit_sampling import (
    sampling_bounds,
    standard_errors,
    student_quantile,
)
from jaxnorm.tools.batch_moments import no_batch_moments
from jaxnorm.tools.findings import Finding, Findings, NormMeasurements
from jaxnorm.tools.problems import (
    ADVICE,
    NormStatistics,
    as_numpy,
    find_problems,
    is_constant,
    is_finite,
    never_updated,
)


def check_options(significance: float, batch_size: int | None) -> None:
    """Check the significance of the test, and the size of training's batches."""
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size > 0):
        raise ValueError(
            f"batch_size must be a positive integer or None, got {batch_size!r}; pass the examples "
            "in a batch of training."
        )
    if not isinstance(significance, Real) or not 0 < significance < 1:
        raise ValueError(
            f"significance must lie between 0 and 1, got {significance!r}; it is the chance that a "
            "sound model has a finding, such as 0.001."
        )


def audit(
    norms: Iterable[NormStatistics], significance: float, batch_size: int | None = None
) -> Findings:
    """Return the findings on these batch norms."""
    norms = list(norms)
    measured = [_measure(norm) for norm in norms]
    tested = [_testable(norm) for norm in measured]
    tests = 2 * sum(int(features.sum()) for features in tested)
    for index, (stats, norm, features) in enumerate(zip(norms, measured, tested, strict=True)):
        observed = _observed(stats)
        t = np.where(features, student_quantile(observed.examples, significance, tests), np.nan)
        eps = max(float(jnp.finfo(stat.dtype).eps) for stat in (stats.mean, stats.var))
        mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
        distance, lowest, highest = sampling_bounds(
            observed, mean, var, momentum, eps, t, batch_size
        )
        shift = _shift(norm, *standard_errors(observed, momentum, batch_size))
        measured[index] = norm._replace(
            distance=distance, lowest=lowest, highest=highest, shift=shift
        )
    pairs = list(zip(norms, measured, strict=True))
    findings = [
        Finding(stats.path, problem, ADVICE[problem], figures, float(effect))
        for stats, norm in pairs
        for problem, effect, figures in find_problems(stats, norm)
    ]
    return Findings(findings, {stats.path: norm for stats, norm in pairs}, significance)


def plot_audit(findings: Findings, file: Any = None) -> Any:
    """Draw how far batch and running statistics are apart, norm by norm.

    Each feature is a stroke. The left half shows the difference of the means in running standard
    deviations, the right half the ratio of the variances. A box shows the range that sampling
    explains, for the median of a norm's features. Norms that have findings are marked.

    Args:
      findings: the result of `audit`.
      file: a path or an open file to save the figure to, if given.

    Returns:
      The figure, of matplotlib.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from jaxnorm.tools.audit_figure import draw
    except ModuleNotFoundError as error:
        raise ImportError(
            "plot_audit must have matplotlib, which is not installed; pip install matplotlib."
        ) from error
    figure = draw(findings)
    if file is not None:
        figure.savefig(file)
    return figure


def _observed(stats: NormStatistics) -> Any:
    """Return the moments of a norm's batch in training, as NumPy arrays."""
    return jax.tree.map(
        as_numpy, no_batch_moments(stats.mean) if stats.observed is None else stats.observed
    )


def _measure(stats: NormStatistics) -> NormMeasurements:
    """Return the measurements of a norm, before the test."""
    observed = _observed(stats)
    mean, var, count = observed.elements
    unknown = np.full(count.shape, np.nan)
    return NormMeasurements(
        running_mean=as_numpy(stats.mean),
        running_var=as_numpy(stats.var),
        batch_mean=np.where(count == 0, np.nan, mean),
        batch_var=np.where(count == 0, np.nan, var),
        count=count,
        examples=int(observed.examples.max(initial=0)),
        distance=unknown,
        lowest=unknown,
        highest=unknown,
        shift=float("nan"),
        epsilon=float(stats.epsilon),
        momentum=float("nan") if stats.momentum is None else float(stats.momentum),
    )


def _shift(norm: NormMeasurements, mean_error: np.ndarray, var_error: np.ndarray) -> float:
    """Return the distance of the outputs in evaluation and training that sampling does not explain.

    If x_hat is the standardized input in training, evaluation has ratio * x_hat + difference.
    On average, sampling adds the squares of the standard errors to the squares of both. Standard
    errors are unknown for a single example.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        difference, ratio = np.abs(norm.mean_difference), np.sqrt(norm.variance_ratio)
        relative_error = mean_error / np.sqrt(norm.running_var + norm.epsilon)
        squares = difference**2 - _where_finite(relative_error) ** 2
        # The variance of x_hat, which is below 1 because of epsilon.
        power = norm.batch_var / (norm.batch_var + norm.epsilon)
        stretch = (ratio - 1) ** 2 - _where_finite(ratio * var_error / 2) ** 2
        squares += np.where(power > 0, stretch * power, 0)
    known = squares[is_finite(norm.running_mean, norm.running_var) & np.isfinite(squares)]
    return float(np.sqrt(max(known.mean(), 0))) if known.size else float("nan")


def _where_finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), a, 0)


def _testable(norm: NormMeasurements) -> np.ndarray:
    """Return which features of the batch can be compared with the running statistics."""
    finite = is_finite(norm.running_mean, norm.running_var) & is_finite(
        norm.batch_mean, norm.batch_var
    )
    return finite & ~is_constant(norm) & (not never_updated(norm))
