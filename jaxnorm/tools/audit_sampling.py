"""How far a batch may be from the running statistics of the same data.

Of n independent examples, one feature:

    m, v    mean and variance of the batch;  M, V  running mean and variance
    z_i     the sum over an example of x - m;  d_i  that of (x - m)^2 - v;  c  elements in all
    b       the examples in a batch of training
    a       1 + (1 - momentum) / (1 + momentum) n / b: the running statistics are an average of
            batches, whose variance adds to that of this batch
    W       V + s^2 (n / b - 1), where s^2 = n / (n - 1) sum(z_i^2) / c^2 is the variance of m: in
            smaller batches the mean varies more, and the variance about it is smaller

    se(m)^2   = a s^2  max(1, V / v)
    se(v)^2   = a n / (n - 1) sum(d_i^2) / c^2,  as a part of v^2 at least what it is of three
                quarters of the norm's features
    |m - M|                  is explained up to  t se(m)
    |(v / W)^(1/3) - 1| 3    is explained up to  t se(v) / v

t is the quantile of Student's distribution with n - 1 degrees of freedom at significance / (4
tests): Bonferroni's correction for two sides and for two tests of each feature.

Few examples of skewed data often lack the rare large values. They are then too near to each other,
and so seem exact. Hence the two bounds from below. The cube root of a variance is nearly normal
(Wilson and Hilferty, 1931).
"""

from typing import Any

import numpy as np

LEAST = 8  # examples: of fewer, only gross differences would be seen


def quantile(examples: np.ndarray, significance: float, tests: int) -> np.ndarray:
    """Of Student's distribution, for that many two-sided tests; NaN for too few examples.

    With t = sqrt(f) sinh(u), the density is proportional to cosh(u)^-f du. The tail's integral is
    taken by Gauss and Laguerre; its logarithm is concave, so that Newton's method finds u from 0.
    """
    f = np.maximum(examples, LEAST)[..., None] - 1.0  # degrees of freedom
    nodes, weights = np.polynomial.laguerre.laggauss(64)
    log_cosh = lambda u: np.logaddexp(u, -u) - np.log(2)

    def tail(u):  # divided by the density
        rate = np.maximum(f * np.tanh(u), np.sqrt(f))
        parts = weights * np.exp(nodes - f * (log_cosh(u + nodes / rate) - log_cosh(u)))
        return parts.sum(-1, keepdims=True) / rate

    u = np.zeros_like(f)
    half, log_p = tail(u), np.log(significance / (2 * max(tests, 1)))
    for _ in range(50):  # each step halves the distance at least, and soon squares it
        over = tail(u)
        u = u + over * (np.log(over / half / 2) - f * log_cosh(u) - log_p)
    return np.where(examples >= LEAST, (np.sqrt(f) * np.sinh(u))[..., 0], np.nan)


def standard_errors(
    observed: Any, momentum: float, batch_size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of the mean, and of the variance as a part of it; for `explained` and the same arguments."""
    batch, n = observed.elements, observed.examples
    average = 1 + (1 - momentum) / (1 + momentum) * _times(n, batch_size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.sqrt(average * n / (n - 1)) / batch.count
        return scale * observed.sums, scale * observed.squares / batch.var


def _times(examples: np.ndarray, batch_size: int | None) -> np.ndarray | int:
    """How many times as large as a batch of training this one is."""
    return 1 if batch_size is None else examples / batch_size


def explained(
    observed: Any,
    mean: np.ndarray,
    var: np.ndarray,
    momentum: float,
    rounding: float,
    t: np.ndarray,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What sampling explains: a distance of means, the lowest and the highest variance of a batch.

    Args:
      observed: a `BatchMoments` of arrays of float64.
      mean: the running mean.
      var: the running variance.
      momentum: the weight of the old statistics.
      rounding: the epsilon of their dtype. A running average stops within half a unit of rounding
        over 1 - momentum, which is explained too.
      t: the quantile, NaN for features that are not tested.
      batch_size: the examples in a batch of training; None for those that were observed.
    """
    batch, n = observed.elements, observed.examples
    of_mean, of_var = standard_errors(observed, momentum, batch_size)
    stop = rounding / 2 / (1 - momentum) if momentum < 1 else rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled_up = np.sqrt(np.maximum(1, var / batch.var))
        distance = t * of_mean * scaled_up + stop * np.abs(mean)
        part = np.where(np.isnan(t), np.nan, of_var)
        if not np.isnan(part).all():
            part = np.maximum(part, np.nanquantile(part, 0.75))
        width = (t * part + stop) / 3
        times = _times(n, batch_size)
        shift = n / (n - 1) * (observed.sums / batch.count) ** 2 * (times - 1)
        expected = np.maximum(var + shift, 0)
    return distance, expected * np.maximum(1 - width, 0) ** 3, expected * (1 + width) ** 3
