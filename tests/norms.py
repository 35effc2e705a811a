"""The five norms, as the tests call them: ours, the truth, and a plain formula for JAX.

Every function takes (x, scale, bias, where) and keyword options, and returns y.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import oracle
from jax import lax

import jaxnorm as jn
from jaxnorm.core.arithmetic import promote


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """One norm with the options that it is tested with; hashed by identity, so static in a jit."""

    name: str
    function: Callable
    truth: Callable
    options: dict[str, Any]
    groups: int | None = None
    subtract_mean: bool = True

    def __call__(self, x, scale=None, bias=None, where=None, **options):
        params = jn.NormParams(scale, bias)
        return self.function(x, params, where=where, **(self.options | options))

    def with_groups(self, shape):
        """The same with as many groups as divide the features of a shape."""
        if not self.groups:
            return self
        count = next(n for n in (32, 8, 7, 5, 2, 1) if shape[-1] % n == 0)
        return self if count == self.groups else _with_groups(self, count)

    def features(self, shape):
        """The shape of scale and bias."""
        axes = self.options.get("axis", -1)
        return tuple(shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))

    def reduction_axes(self, ndim):
        """The axes that share statistics, in an array whose last axis is split into groups."""
        if self.name == "batch":
            return tuple(range(ndim - 1))
        if self.name in ("layer", "rms"):
            axes = self.options["axis"]
            return tuple(axis % ndim for axis in (axes if isinstance(axes, tuple) else (axes,)))
        return tuple(range(1, ndim - 1)) + ((ndim,) if self.groups else ())

    def split(self, a):
        """The last axis as (groups, features of a group), if there are groups."""
        if not self.groups:
            return a
        size = a.shape[-1]
        last = (self.groups, size // self.groups) if size > 1 else (1, 1)
        return a.reshape(a.shape[:-1] + last)

    def plain(self, x, scale=None, bias=None, where=None, epsilon=1e-6):
        """The textbook's formula, for JAX to differentiate in float64."""
        v, axes = self.split(x), self.reduction_axes(x.ndim)
        w = jnp.broadcast_to(True if where is None else self.split(where), v.shape)
        n = jnp.sum(w, axes, keepdims=True).astype(v.real.dtype)
        mean = (
            jnp.sum(v, axes, where=w, keepdims=True) / n.astype(v.dtype)
            if self.subtract_mean
            else 0
        )
        var = jnp.sum(jnp.abs(v - mean) ** 2, axes, where=w, keepdims=True) / n
        h = (v - mean) * lax.rsqrt(var + epsilon).astype(v.dtype)
        y = h.reshape(x.shape)
        for param, combine in ((scale, jnp.multiply), (bias, jnp.add)):
            if param is not None:
                y = combine(y, param.reshape((1,) * (x.ndim - param.ndim) + param.shape))
        return y


@functools.cache
def _with_groups(norm, count):
    return dataclasses.replace(norm, options={"num_groups": count}, groups=count)


def _batch(x, params, *, where=None, **options):
    state = jn.init_batch_norm_state(x.shape[-1], promote(x.dtype, jnp.float32))
    return jn.batch_norm(x, state, params=params, where=where, **options)[0]


NORMS = [
    Norm("batch", _batch, oracle.batch_norm, {"epsilon": 1e-6}),
    Norm("layer", jn.layer_norm, oracle.layer_norm, {"axis": -1}),
    Norm("layer", jn.layer_norm, oracle.layer_norm, {"axis": (-2, -1)}),
    Norm("rms", jn.rms_norm, oracle.rms_norm, {"axis": -1}, subtract_mean=False),
    Norm("group", jn.group_norm, oracle.group_norm, {"num_groups": 2}, groups=2),
    Norm("instance", jn.instance_norm, oracle.instance_norm, {}),
]


def norm_id(norm: Norm) -> str:
    """A name for pytest."""
    return norm.name + ("-two-axes" if norm.options.get("axis") == (-2, -1) else "")
