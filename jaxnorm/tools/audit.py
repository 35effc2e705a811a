"""What is wrong with the batch norms of a model: on the host, without Flax."""

from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.tools.audit_sampling import LEAST, explained, quantile, standard_errors
from jaxnorm.tools.batch_moments import BatchMoments, no_batch_moments
from jaxnorm.tools.findings import Finding, Findings, Measured

ADVICE = {
    "running statistics were never updated": "Call the norm in training mode, with a momentum "
    'below 1, and keep the new statistics (in linen, those that mutable=["batch_stats"] returns).',
    "batch and running statistics differ": "Evaluation is not what training was: give inputs as in "
    "training, recalibrate if the weights have changed, or train on until the statistics settle.",
    "features are constant in the batch": "Such a feature becomes its bias: look for dead units "
    "before the norm, or for inputs that are all alike.",
    "running statistics are not finite": "Recalibrate, and find the step that made them so: norms "
    "are listed in the order in which they are called.",
    "batch statistics are not finite": "Look before the first such norm of this list, which is in "
    "the order of calls, for what overflows or is NaN.",
    "running statistics are in half precision": "Keep them in float32, whatever the weights are "
    "in: the small steps of a running average are rounded away.",
    "momentum looks like PyTorch's": "It is the weight of the old statistics here, and of the new "
    "ones in PyTorch: give 1 minus PyTorch's momentum.",
    "epsilon is larger than the variance": "Such features leave the norm with a variance below "
    "1/2: make what comes before the norm larger, or epsilon smaller.",
    "devices disagree on running statistics": "Give the norm the axis_name of the devices, or "
    "average its statistics over them, before they are used or saved.",
}


class AuditedNorm(NamedTuple):
    """A batch norm.

    Attributes:
      path: where it is in the model.
      mean: its running mean, as the model has it.
      var: its running variance.
      observed: what it saw in training mode, or None.
      epsilon: that of the norm.
      momentum: that of the norm.
    """

    path: str
    mean: Any
    var: Any
    observed: BatchMoments | None
    epsilon: float
    momentum: float


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
    norms: Iterable[AuditedNorm], significance: float, batch_size: int | None = None
) -> Findings:
    """What is wrong with these batch norms."""
    norms = list(norms)
    measured = [_measured(norm) for norm in norms]
    tested = [_testable(one) for one in measured]
    tests = 2 * sum(int(features.sum()) for features in tested)
    for place, (norm, one, features) in enumerate(zip(norms, measured, tested, strict=True)):
        observed = _observed(norm)
        t = np.where(features, quantile(observed.examples, significance, tests), np.nan)
        eps = max(float(jnp.finfo(stat.dtype).eps) for stat in (norm.mean, norm.var))
        mean, var, momentum = one.running_mean, one.running_var, one.momentum
        distance, lowest, highest = explained(observed, mean, var, momentum, eps, t, batch_size)
        shift = _shift(one, *standard_errors(observed, momentum, batch_size))
        measured[place] = one._replace(
            distance=distance, lowest=lowest, highest=highest, shift=shift
        )
    pairs = list(zip(norms, measured, strict=True))
    found = [
        Finding(norm.path, problem, ADVICE[problem], figures, float(effect))
        for norm, one in pairs
        for problem, effect, figures in _problems(norm, one)
    ]
    return Findings(found, {norm.path: one for norm, one in pairs}, significance)


def plot_audit(findings: Findings, file: Any = None) -> Any:
    """Draw how far batch and running statistics are apart, norm by norm.

    Each feature is a stroke. On the left is the difference of the means in running standard
    deviations, on the right the ratio of the variances. A box shows what sampling explains, for the
    median of a norm's features. Norms that have findings are marked.

    Args:
      findings: what `audit` returns.
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


def _observed(norm: AuditedNorm) -> Any:
    """The moments of the batch that a norm got in training, as NumPy arrays."""
    return jax.tree.map(
        _as_numpy, no_batch_moments(norm.mean) if norm.observed is None else norm.observed
    )


def _as_numpy(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _measured(norm: AuditedNorm) -> Measured:
    """What was measured of a norm, before the test."""
    observed = _observed(norm)
    mean, var, count = observed.elements
    unknown = np.full(count.shape, np.nan)
    return Measured(
        running_mean=_as_numpy(norm.mean),
        running_var=_as_numpy(norm.var),
        batch_mean=np.where(count == 0, np.nan, mean),
        batch_var=np.where(count == 0, np.nan, var),
        count=count,
        examples=int(observed.examples.max(initial=0)),
        distance=unknown,
        lowest=unknown,
        highest=unknown,
        shift=float("nan"),
        epsilon=float(norm.epsilon),
        momentum=float("nan") if norm.momentum is None else float(norm.momentum),
    )


def _shift(one: Measured, of_mean: np.ndarray, of_var: np.ndarray) -> float:
    """How far the outputs of evaluation and training are apart, beyond what sampling explains.

    With h the standardized input in training, that of evaluation is ratio h + difference. The
    squares of the standard errors are what sampling adds to the squares of both on average; they
    are unknown for a single example.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        difference, ratio = np.abs(one.mean_difference), np.sqrt(one.variance_ratio)
        mean_error = of_mean / np.sqrt(one.running_var + one.epsilon)
        squares = difference**2 - _where_finite(mean_error) ** 2
        power = one.batch_var / (one.batch_var + one.epsilon)  # of h, which epsilon makes smaller
        stretch = (ratio - 1) ** 2 - _where_finite(ratio * of_var / 2) ** 2
        squares += np.where(power > 0, stretch * power, 0)
    known = squares[_finite(one.running_mean, one.running_var) & np.isfinite(squares)]
    return float(np.sqrt(max(known.mean(), 0))) if known.size else float("nan")


def _where_finite(a: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(a), a, 0)


def _testable(one: Measured) -> np.ndarray:
    """Which features of the batch can be compared with the running statistics."""
    finite = _finite(one.running_mean, one.running_var) & _finite(one.batch_mean, one.batch_var)
    return finite & ~_constant(one) & (not _untouched(one))


def _finite(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    return np.isfinite(mean) & np.isfinite(var) & (var >= 0)


def _constant(one: Measured) -> np.ndarray:
    """Which features are constant in the batch, up to rounding in float32."""
    rounding = (np.finfo(np.float32).eps * np.abs(one.batch_mean)) ** 2
    return (one.count > 1) & (one.batch_var <= rounding)


def _untouched(one: Measured) -> bool:
    return bool((one.running_mean == 0).all() and (one.running_var == 1).all())


def _problems(norm: AuditedNorm, one: Measured) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Each problem of a norm, its effect, and its figures."""
    constant, apart = _constant(one), one.means_apart | one.variances_apart
    sound = _finite(one.running_mean, one.running_var) & ~constant
    tells = one.count >= LEAST  # of one element the variance is zero
    smallest = np.where(tells, np.fmin(one.running_var, one.batch_var), one.running_var)
    smallest = np.where(sound, smallest, np.inf)
    of = lambda features: {"features": float(features.sum()), "of": float(features.size)}
    if _untouched(one):
        yield "running statistics were never updated", one.shift, _distances(one)
    if apart.any():
        which = {"means": one.means_apart.sum(), "variances": one.variances_apart.sum()}
        which = {name: float(number) for name, number in which.items()}
        figures = of(apart) | which | _distances(one)
        yield "batch and running statistics differ", one.shift, figures
    if constant.any():
        # They are zero, and their standard deviation would be one.
        yield "features are constant in the batch", np.sqrt(constant.mean()), of(constant)
    wrong = ~_finite(one.running_mean, one.running_var)
    if wrong.any():
        yield "running statistics are not finite", np.inf, of(wrong)
    wrong = ~_finite(one.batch_mean, one.batch_var) & (one.count > 0)
    if wrong.any():
        yield "batch statistics are not finite", np.inf, of(wrong)
    bits = min(8 * stat.dtype.itemsize // (1 + np.iscomplexobj(stat)) for stat in norm[1:3])
    if bits < 32:
        yield "running statistics are in half precision", one.shift, {"bits": float(bits)}
    if one.momentum < 0.5:
        yield "momentum looks like PyTorch's", one.shift, {"momentum": one.momentum}
    if (small := one.epsilon > smallest).any():
        figures = {"epsilon": one.epsilon, "smallest_variance": float(smallest.min())}
        left = np.sqrt(smallest[small] / (smallest[small] + one.epsilon))  # standard deviations
        effect = np.sqrt(((1 - left) ** 2).sum() / small.size)
        yield "epsilon is larger than the variance", effect, of(small) | figures
    if figures := _between_devices(norm, one):
        # At most, because these are of the features and devices that are furthest apart.
        ratio = np.sqrt(figures["ratio_of_variances"])
        effect = np.hypot(figures["difference_of_means"], ratio - 1)
        yield "devices disagree on running statistics", effect, figures


def _distances(one: Measured) -> dict[str, float]:
    """How far batch and running statistics are apart, where they are finite."""
    difference, ratio = np.abs(one.mean_difference), one.variance_ratio
    finite = np.isfinite(difference) & np.isfinite(ratio)
    if not finite.any():
        return {}
    return {
        "mean_difference": float(difference[finite].max()),
        "smallest_variance_ratio": float(ratio[finite].min()),
        "largest_variance_ratio": float(ratio[finite].max()),
    }


def _between_devices(norm: AuditedNorm, one: Measured) -> dict[str, float]:
    """How far copies of one array on several devices are apart; empty if they are equal."""
    different, means, variances = set(), 0.0, 1.0
    scale = np.sqrt(np.maximum(one.running_var, 0) + one.epsilon)
    for array in (norm.mean, norm.var):
        first = {}
        for shard in getattr(array, "addressable_shards", ()):
            copy = _as_numpy(shard.data)
            original = first.setdefault(str(shard.index), copy)
            if np.array_equal(copy, original, equal_nan=True):
                continue
            different.add(shard.device)
            with np.errstate(invalid="ignore", divide="ignore"):
                if array is norm.mean:
                    means = np.fmax(means, np.abs(copy - original) / scale[shard.index]).max()
                else:
                    ratio = (copy + one.epsilon) / (original + one.epsilon)
                    variances = np.fmax(variances, np.fmax(ratio, 1 / ratio)).max()
    if not different:
        return {}
    figures = {"difference_of_means": float(means), "ratio_of_variances": float(variances)}
    return {"devices": float(len(different))} | figures
