"""The truth: NumPy in float64, one function per norm, written from the papers' definitions.

`standardized` and `gradients` do not depend on layouts: they take the axes that share statistics of
an array in which the groups are already an axis of their own.
"""

import math
from typing import Any

import numpy as np


def wide(a):
    """In float64, or complex128."""
    return np.asarray(a, np.complex128 if np.iscomplexobj(a) else np.float64)


def statistics(x, axes, where=None, subtract_mean=True):
    """Mean, variance and count over axes, which stay with size one."""
    w = np.broadcast_to(True if where is None else where, x.shape)
    n = w.sum(axes, keepdims=True)
    mean = np.where(w, x, 0).sum(axes, keepdims=True) / np.maximum(n, 1)
    if not subtract_mean:
        mean = np.zeros_like(mean)
    var = np.where(w, np.abs(x - mean) ** 2, 0).sum(axes, keepdims=True) / np.maximum(n, 1)
    return mean, var, n


def standardized(x, axes, epsilon, where=None, subtract_mean=True):
    """h and rstd; both zero where nothing counts."""
    x = wide(x)
    mean, var, n = statistics(x, axes, where, subtract_mean)
    with np.errstate(divide="ignore"):
        rstd = np.where((n > 0) & (var + epsilon > 0), 1 / np.sqrt(var + epsilon), 0)
    return (x - mean) * rstd, rstd, n


def gradient(x, g, axes, epsilon, where=None, subtract_mean=True):
    """The cotangent of x, for g that of the standardized x: with the statistics' own terms."""
    w = np.broadcast_to(True if where is None else where, np.shape(x))
    h, rstd, n = standardized(x, axes, epsilon, where, subtract_mean)
    own = h * (g * h).sum(axes, keepdims=True)
    if subtract_mean:
        own = own + g.sum(axes, keepdims=True)
    return rstd * (g - w * own / np.maximum(n, 1))


def two_norm(x, axes, where: Any = None):
    """The length of vectors along axes, which stay with size one."""
    counted = True if where is None else where
    return np.sqrt(np.where(counted, np.abs(wide(x)) ** 2, 0).sum(axes, keepdims=True))


def affine(h, scale, bias, axes):
    """h * scale + bias, where scale and bias span axes."""
    shape = [size if axis in axes else 1 for axis, size in enumerate(h.shape)]
    h = h if scale is None else h * wide(scale).reshape(shape)
    return h if bias is None else h + wide(bias).reshape(shape)


def batch_norm(x, scale=None, bias=None, *, feature_axis=-1, epsilon=1e-5, where=None):
    """Ioffe and Szegedy, 2015."""
    feature = feature_axis % np.ndim(x)
    axes = tuple(axis for axis in range(np.ndim(x)) if axis != feature)
    return affine(standardized(x, axes, epsilon, where)[0], scale, bias, (feature,))


def corrections(x, axes, running, limits, epsilon, where=None):
    """r and d of batch renormalization, by the running mean and variance and (r_max, d_max)."""
    mean, var, n = statistics(wide(x), axes, where)
    running_mean, running_var = (wide(a).reshape(mean.shape) for a in running)
    r_max, d_max = limits
    std = np.sqrt(running_var + epsilon)
    r = np.clip(np.sqrt(var + epsilon) / std, 1 / r_max, r_max)
    d = (mean - running_mean) / std
    if np.iscomplexobj(d):  # beyond the paper: its absolute value is clipped
        d = d * np.minimum(1, d_max / np.maximum(np.abs(d), np.finfo(float).tiny))
    else:
        d = np.clip(d, -d_max, d_max)
    return np.where(n > 0, r, 1), np.where(n > 0, d, 0)


def batch_renorm(
    x, running, limits, scale=None, bias=None, *, feature_axis=-1, epsilon=1e-5, where=None
):
    """Ioffe, 2017; with the variance for state instead of its root."""
    features = tuple(a % np.ndim(x) for a in np.atleast_1d(feature_axis))
    axes = tuple(axis for axis in range(np.ndim(x)) if axis not in features)
    r, d = corrections(x, axes, running, limits, epsilon, where)
    h = standardized(x, axes, epsilon, where)[0]
    return affine(h * r + d, scale, bias, features)


def fold_batch_norm(
    kernel, bias, mean, var, scale, norm_bias, *, output_axis=-1, epsilon=1e-5, scale_offset=0.0
):
    """Jacob et al., 2018, equation 14, and its bias."""
    factor = (scale_offset + wide(scale)) / np.sqrt(wide(var) + epsilon)
    folded = affine(wide(kernel), factor, None, (output_axis % np.ndim(kernel),))
    return folded, (wide(bias) - mean) * factor + norm_bias


def layer_norm(x, scale=None, bias=None, *, axis=-1, epsilon=1e-6, where=None):
    """Ba, Kiros and Hinton, 2016."""
    axes = tuple(a % np.ndim(x) for a in np.atleast_1d(axis))
    return affine(standardized(x, axes, epsilon, where)[0], scale, bias, axes)


def rms_norm(x, scale=None, bias=None, *, axis=-1, epsilon=1e-6, where=None):
    """Zhang and Sennrich, 2019."""
    axes = tuple(a % np.ndim(x) for a in np.atleast_1d(axis))
    return affine(standardized(x, axes, epsilon, where, subtract_mean=False)[0], scale, bias, axes)


def group_norm(
    x, scale=None, bias=None, *, num_groups=32, feature_axis=-1, epsilon=1e-6, where=None
):
    """Wu and He, 2018: group by group."""
    x = wide(x)
    w = np.broadcast_to(True if where is None else where, x.shape)
    axes = tuple(range(1, x.ndim))
    runs = np.split(np.arange(x.shape[feature_axis]), num_groups)
    h = np.concatenate(
        [
            standardized(x.take(run, feature_axis), axes, epsilon, where=w.take(run, feature_axis))[
                0
            ]
            for run in runs
        ],
        feature_axis,
    )
    return affine(h, scale, bias, (feature_axis % x.ndim,))


def instance_norm(x, scale=None, bias=None, *, feature_axis=-1, epsilon=1e-6, where=None):
    """Ulyanov, Vedaldi and Lempitsky, 2016: image by image, channel by channel."""
    feature = feature_axis % np.ndim(x)
    axes = tuple(axis for axis in range(1, np.ndim(x)) if axis != feature)
    return affine(standardized(x, axes, epsilon, where)[0], scale, bias, (feature,))


def unit_norm(x, *, axis=-1, ord=2, epsilon=1e-12, where=None):
    """The length of a vector is its 1-, 2- or infinity-norm."""
    x = wide(x)
    size = np.abs(x) if where is None else np.where(where, np.abs(x), 0)
    power = {1: lambda a: a.sum(axis, keepdims=True), np.inf: lambda a: a.max(axis, keepdims=True)}
    power[2] = lambda a: np.sqrt((a**2).sum(axis, keepdims=True))
    return x / np.maximum(power[ord](size), epsilon)


def global_response_norm(x, scale=None, bias=None, *, feature_axis=-1, epsilon=1e-6):
    """Woo et al., 2023: gx, nx, and gamma * (x * nx) + beta + x."""
    x, feature = wide(x), feature_axis % np.ndim(x)
    axes = tuple(axis for axis in range(1, x.ndim) if axis != feature)
    gx = np.sqrt((np.abs(x) ** 2).sum(axes, keepdims=True))
    nx = gx / (gx.mean(feature, keepdims=True) + epsilon)
    return affine(x * nx, scale, bias, (feature,)) + x


def filter_response_norm(
    x, scale=None, bias=None, threshold=None, *, feature_axis=-1, epsilon=1e-6
):
    """Singh and Krishnan, 2019: FRN, and the TLU."""
    x, feature = wide(x), feature_axis % np.ndim(x)
    axes = tuple(axis for axis in range(1, x.ndim) if axis != feature)
    nu2 = (np.abs(x) ** 2).mean(axes, keepdims=True)
    y = affine(x / np.sqrt(nu2 + epsilon), scale, bias, (feature,))
    return y if threshold is None else np.maximum(y, affine(0 * x, None, threshold, (feature,)))


def dynamic_tanh(x, alpha, scale=None, bias=None, *, feature_axis=-1):
    """Zhu et al., 2025."""
    feature = feature_axis % np.ndim(x)
    return affine(np.tanh(_times(x, alpha, feature)), scale, bias, (feature,))


def dynamic_erf(x, alpha, shift, scale=None, bias=None, *, feature_axis=-1):
    """Chen et al., 2025."""
    feature = feature_axis % np.ndim(x)
    argument = _times(x, alpha, feature) + _times(np.ones_like(x), shift, feature)
    return affine(np.vectorize(math.erf)(argument), scale, bias, (feature,))


def _times(x, a, feature):
    return wide(x) * wide(a) if np.ndim(a) == 0 else affine(wide(x), a, None, (feature,))


def local_response_norm(x, *, size, alpha=1e-4, beta=0.75, k=1.0, feature_axis=-1):
    """Krizhevsky et al., 2012, with alpha / size, feature by feature, in ONNX's words."""
    x = np.moveaxis(wide(x), feature_axis, -1)
    last = x.shape[-1] - 1
    squares = np.zeros(x.shape)
    for c in range(last + 1):
        first = max(0, c - math.floor((size - 1) / 2))
        end = min(last, c + math.ceil((size - 1) / 2))
        squares[..., c] = (np.abs(x[..., first : end + 1]) ** 2).sum(-1)
    return np.moveaxis(x / (k + alpha / size * squares) ** beta, -1, feature_axis)


def cotangents(function, args, dy):
    """Those of all arguments, by central differences in float64: right to some 1e-10."""
    args = [wide(a) for a in args]

    def along(index, place):
        step = np.zeros_like(args[index])
        step[place] = 1e-5 * max(np.abs(args[index]).max(), np.finfo(np.float64).tiny)
        ends = [
            function(*args[:index], args[index] + sign * step, *args[index + 1 :])
            for sign in (1, -1)
        ]
        return ((ends[0] - ends[1]) / (2 * step[place]) * wide(dy)).sum()

    return [
        np.array([along(i, place) for place in np.ndindex(a.shape)]).reshape(a.shape)
        for i, a in enumerate(args)
    ]


def other_axes(x, feature_axis):
    """All axes but those of the features."""
    features = [axis % np.ndim(x) for axis in np.atleast_1d(feature_axis)]
    return tuple(axis for axis in range(np.ndim(x)) if axis not in features)


def weight_norm(v, g, *, feature_axis=-1, epsilon=1e-12):
    """Salimans and Kingma, 2016."""
    axes = other_axes(v, feature_axis)
    length = np.sqrt(two_norm(v, axes) ** 2 + epsilon)
    return wide(v) / np.where(length > 0, length, 1) * np.expand_dims(wide(g), axes)


def weight_norm_gradient(v, g, dw, *, feature_axis=-1, epsilon=1e-12):
    """The cotangents of v and g."""
    axes = other_axes(v, feature_axis)
    h = weight_norm(v, np.ones_like(g), feature_axis=feature_axis, epsilon=epsilon)
    length = np.sqrt(two_norm(v, axes) ** 2 + epsilon)
    dg = (wide(dw) * h).sum(axes, keepdims=True)
    return np.expand_dims(wide(g), axes) / length * (dw - h * dg), dg.squeeze(axes)


def standardize_weight(w, gain=None, *, feature_axis=-1, epsilon=1e-6, fan_in=False):
    """Qiao et al., 2019; with fan_in, Brock et al., 2021."""
    axes, features = other_axes(w, feature_axis), np.atleast_1d(feature_axis) % np.ndim(w)
    if not fan_in:
        return affine(standardized(w, axes, epsilon)[0], gain, None, features)
    mean, var, n = statistics(wide(w), axes)
    return affine((wide(w) - mean) / np.sqrt(np.maximum(var * n, epsilon)), gain, None, features)


def matrix(w, feature_axis=-1):
    """Weights as a matrix, whose columns are the features."""
    w = np.moveaxis(wide(w), feature_axis, -1)
    return w.reshape(-1, w.shape[-1])


def power_iteration(w, u, steps, *, feature_axis=-1):
    """Miyato et al., 2018, algorithm 1: u, v and sigma after `steps` steps."""
    m, u = matrix(w, feature_axis), wide(u)
    v = m @ u / np.linalg.norm(m @ u)
    for _ in range(steps):
        v = m @ u / np.linalg.norm(m @ u)
        u = m.T @ v / np.linalg.norm(m.T @ v)
    return u, v, v @ m @ u


def spectral_gradient(w, u, v, dy):
    """The cotangent of w, whose features come last, for that of w / sigma."""
    sigma, vu = v @ matrix(w) @ u, np.outer(v, u).reshape(np.shape(w))
    return dy / sigma - np.sum(dy * wide(w)) / sigma**2 * vu


def units(result, truth, dtype=np.float32):
    """The largest error, in units in the last place of the largest element of the truth."""
    result, truth = wide(result), wide(truth)
    if not truth.size:
        return 0.0
    largest = max(np.abs(truth).max(), np.finfo(dtype).tiny)
    error = np.abs(result - truth).max() / largest / float(np.finfo(dtype).eps)
    return math.inf if np.isnan(error) else float(error)
