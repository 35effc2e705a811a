"""The problems of a batch norm: their checks, and what to do."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxnorm.tools.audit_sampling import MIN_EXAMPLES
from jaxnorm.tools.batch_moments import BatchMoments
from jaxnorm.tools.findings import NormMeasurements

ADVICE = {
    "running statistics were never updated": "Call the norm in training mode, with a momentum "
    'below 1, and keep the new statistics (in linen, those that mutable=["batch_stats"] returns).',
    "batch and running statistics differ": "Evaluation differs from training: give inputs as in "
    "training, recalibrate if the weights have changed, or train on until the statistics settle.",
    "features are constant in the batch": "Such a feature becomes its bias: look for dead units "
    "before the norm, or for inputs that are all alike.",
    "running statistics are not finite": "Recalibrate, and find the step that made them so: norms "
    "are listed in the order in which they are called.",
    "batch statistics are not finite": "Before the first such norm of this list, which is in the "
    "order of calls, look for an overflow or a NaN.",
    "running statistics are in half precision": "Keep them in float32, whatever the dtype of the "
    "weights: half precision rounds the small steps of a running average away.",
    "momentum looks like PyTorch's": "Momentum is the weight of the old statistics here, and "
    "of the new ones in PyTorch: give 1 minus PyTorch's momentum.",
    "epsilon is larger than the variance": "The output of such features has a variance below 1/2: "
    "make the inputs of the norm larger, or epsilon smaller.",
    "devices disagree on running statistics": "Give the norm the axis_name of the devices, or "
    "average its statistics over them, before they are used or saved.",
}


class NormStatistics(NamedTuple):
    """The running statistics of a batch norm, and the moments of its batch.

    Attributes:
      path: the path of the norm in the model.
      mean: its running mean, in the model's dtype.
      var: its running variance.
      observed: the moments of its input in training mode, or None.
      epsilon: its epsilon.
      momentum: its momentum.
    """

    path: str
    mean: Any
    var: Any
    observed: BatchMoments | None
    epsilon: float
    momentum: float


def as_numpy(array: Any) -> np.ndarray:
    """Return an array in float64, or in complex128."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def is_finite(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Return which features have finite statistics."""
    return np.isfinite(mean) & np.isfinite(var) & (var >= 0)


def is_constant(norm: NormMeasurements) -> np.ndarray:
    """Return which features are constant in the batch, up to rounding in float32."""
    rounding = (np.finfo(np.float32).eps * np.abs(norm.batch_mean)) ** 2
    return (norm.count > 1) & (norm.batch_var <= rounding)


def never_updated(norm: NormMeasurements) -> bool:
    """Return whether the running statistics still have their initial values."""
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all())


def find_problems(
    stats: NormStatistics, norm: NormMeasurements
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Yield each problem of a norm, its effect, and its figures."""
    constant, differ = is_constant(norm), norm.means_apart | norm.variances_apart
    sound = is_finite(norm.running_mean, norm.running_var) & ~constant
    has_var = norm.count >= MIN_EXAMPLES  # the variance of one element is zero
    smallest = np.where(has_var, np.fmin(norm.running_var, norm.batch_var), norm.running_var)
    smallest = np.where(sound, smallest, np.inf)
    share = lambda features: {"features": float(features.sum()), "of": float(features.size)}
    if never_updated(norm):
        yield "running statistics were never updated", norm.shift, _distances(norm)
    if differ.any():
        counts = {"means": norm.means_apart.sum(), "variances": norm.variances_apart.sum()}
        counts = {name: float(number) for name, number in counts.items()}
        figures = share(differ) | counts | _distances(norm)
        yield "batch and running statistics differ", norm.shift, figures
    if constant.any():
        # Their output is zero, and its standard deviation should be 1.
        yield "features are constant in the batch", np.sqrt(constant.mean()), share(constant)
    wrong = ~is_finite(norm.running_mean, norm.running_var)
    if wrong.any():
        yield "running statistics are not finite", np.inf, share(wrong)
    wrong = ~is_finite(norm.batch_mean, norm.batch_var) & (norm.count > 0)
    if wrong.any():
        yield "batch statistics are not finite", np.inf, share(wrong)
    bits = min(
        8 * stat.dtype.itemsize // (1 + np.iscomplexobj(stat)) for stat in (stats.mean, stats.var)
    )
    if bits < 32:
        yield "running statistics are in half precision", norm.shift, {"bits": float(bits)}
    if norm.momentum < 0.5:
        yield "momentum looks like PyTorch's", norm.shift, {"momentum": norm.momentum}
    if (small := norm.epsilon > smallest).any():
        figures = {"epsilon": norm.epsilon, "smallest_variance": float(smallest.min())}
        output_std = np.sqrt(smallest[small] / (smallest[small] + norm.epsilon))
        effect = np.sqrt(((1 - output_std) ** 2).sum() / small.size)
        yield "epsilon is larger than the variance", effect, share(small) | figures
    if figures := _between_devices(stats, norm):
        # An upper bound: the figures are the largest over features and devices.
        ratio = np.sqrt(figures["ratio_of_variances"])
        effect = np.hypot(figures["difference_of_means"], ratio - 1)
        yield "devices disagree on running statistics", effect, figures


def _distances(norm: NormMeasurements) -> dict[str, float]:
    """Return the largest differences of batch and running statistics, where they are finite."""
    difference, ratio = np.abs(norm.mean_difference), norm.variance_ratio
    finite = np.isfinite(difference) & np.isfinite(ratio)
    if not finite.any():
        return {}
    return {
        "mean_difference": float(difference[finite].max()),
        "smallest_variance_ratio": float(ratio[finite].min()),
        "largest_variance_ratio": float(ratio[finite].max()),
    }


def _between_devices(stats: NormStatistics, norm: NormMeasurements) -> dict[str, float]:
    """Return how much copies of one array on several devices differ; {} if they are equal."""
    different, means, variances = set(), 0.0, 1.0
    scale = np.sqrt(np.maximum(norm.running_var, 0) + norm.epsilon)
    for array in (stats.mean, stats.var):
        first = {}
        for shard in getattr(array, "addressable_shards", ()):
            copy = as_numpy(shard.data)
            original = first.setdefault(str(shard.index), copy)
            if np.array_equal(copy, original, equal_nan=True):
                continue
            different.add(shard.device)
            with np.errstate(invalid="ignore", divide="ignore"):
                if array is stats.mean:
                    means = np.fmax(means, np.abs(copy - original) / scale[shard.index]).max()
                else:
                    ratio = (copy + norm.epsilon) / (original + norm.epsilon)
                    variances = np.fmax(variances, np.fmax(ratio, 1 / ratio)).max()
    if not different:
        return {}
    figures = {"difference_of_means": float(means), "ratio_of_variances": float(variances)}
    return {"devices": float(len(different))} | figures
