"""Bounds on the distance of a batch from the running statistics of the same data.

For one feature of n independent examples:

    m, v    mean and variance of the batch;  M, V  running mean and variance
    z_i     the sum over example i of x - m;  d_i  the sum of (x - m)^2 - v;  c  all elements
    b       the examples in a batch of training
    a       1 + (1 - momentum) / (1 + momentum) n / b: the running statistics are an average of
            batches, and its variance adds to the variance of this batch
    W       V + s^2 (n / b - 1), where s^2 = n / (n - 1) sum(z_i^2) / c^2 is the variance of m: in
            smaller batches the mean varies more, and the variance about it is smaller

    se(m)^2   = a s^2  max(1, V / v)
    se(v)^2   = a n / (n - 1) sum(d_i^2) / c^2,  relative to v^2 at least the 75th percentile of
                the norm's features
    |m - M|                  is at most  t se(m)
    |(v / W)^(1/3) - 1| 3    is at most  t se(v) / v

t is the quantile of Student's distribution with n - 1 degrees of freedom at significance / (4
tests): Bonferroni's correction for two sides and for two tests of each feature.

A small sample of skewed data often lacks the rare large values. Its standard errors are then too
small, which is why both have a lower bound. The cube root of a variance is nearly normal (Wilson
and Hilferty, 1931).
"""

from typing import Any

import numpy as np

MIN_EXAMPLES = 8  # with fewer, only gross differences would be significant


def student_quantile(examples: np.ndarray, significance: float, tests: int) -> np.ndarray:
    """Return the quantile of Student's distribution for two-sided tests; NaN for too few examples.

    With t = sqrt(f) sinh(u), the density is proportional to cosh(u)^-f du. The integral of the tail
    is computed by Gauss-Laguerre quadrature. Its logarithm is concave, so that Newton's method
    converges from u = 0.
    """
    f = np.maximum(examples, MIN_EXAMPLES)[..., None] - 1.0  # degrees of freedom
    nodes, weights = np.polynomial.laguerre.laggauss(64)
    log_cosh = lambda u: np.logaddexp(u, -u) - np.log(2)

    def tail(u):  # divided by the density
        rate = np.maximum(f * np.tanh(u), np.sqrt(f))
        parts = weights * np.exp(nodes - f * (log_cosh(u + nodes / rate) - log_cosh(u)))
        return parts.sum(-1, keepdims=True) / rate

    u = np.zeros_like(f)
    half, log_p = tail(u), np.log(significance / (2 * max(tests, 1)))
    for _ in range(50):  # each step at least halves the distance; convergence is quadratic
        ratio = tail(u)
        u = u + ratio * (np.log(ratio / half / 2) - f * log_cosh(u) - log_p)
    return np.where(examples >= MIN_EXAMPLES, (np.sqrt(f) * np.sinh(u))[..., 0], np.nan)


def standard_errors(
    observed: Any, momentum: float, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard error of the mean, and the relative one of the variance."""
    batch, n = observed.elements, observed.examples
    average = 1 + (1 - momentum) / (1 + momentum) * _size_ratio(n, batch_size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(average * n / (n - 1)) / batch.count
        return scale * observed.sums, scale * observed.squares / batch.var


def _size_ratio(examples: np.ndarray, batch_size: int | None) -> np.ndarray | int:
    """Return the size of the observed batch over that of a batch of training."""
    return 1 if batch_size is None else examples / batch_size


def sampling_bounds(
    observed: Any,
    mean: np.ndarray,
    var: np.ndarray,
    momentum: float,
    rounding: float,
    t: np.ndarray,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the largest distance of means, and the lowest and highest variance, due to sampling.

    Args:
      observed: a `BatchMoments` of arrays of float64.
      mean: the running mean.
      var: the running variance.
      momentum: the weight of the old statistics.
      rounding: the epsilon of their dtype. A running average stops within half a unit of rounding
        over 1 - momentum, which is added to the bounds.
      t: the quantile, NaN for features that are not tested.
      batch_size: the examples in a batch of training; None for the number of observed examples.
    """
    batch, n = observed.elements, observed.examples
    mean_error, var_error = standard_errors(observed, momentum, batch_size)
    stop = rounding / 2 / (1 - momentum) if momentum < 1 else rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_up = np.sqrt(np.maximum(1, var / batch.var))
        distance = t * mean_error * scaled_up + stop * np.abs(mean)
        error = np.where(np.isnan(t), np.nan, var_error)
        if not np.isnan(error).all():
            error = np.maximum(error, np.nanquantile(error, 0.75))
        width = (t * error + stop) / 3
        size_ratio = _size_ratio(n, batch_size)
        shift = n / (n - 1) * (observed.sums / batch.count) ** 2 * (size_ratio - 1)
        expected = np.maximum(var + shift, 0)
    return distance, expected * np.maximum(1 - width, 0) ** 3, expected * (1 + width) ** 3
