"""A bounded function instead of standardizing: y = function(alpha * x + shift) * scale + bias.

There are no statistics. The backward pass keeps x and recomputes the function.
"""

import functools
from collections.abc import Callable

import jax

from jaxnorm.core.arguments import check_params, check_real, check_scalar_or_features
from jaxnorm.core.layout import Layout
from jaxnorm.core.norm import make_spec, program
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams, affine
from jaxnorm.core.sums import expand


def bound(
    name: str,
    function: Callable,
    x: jax.Array,
    layout: Layout,
    alpha,
    shift,
    params: NormParams | None,
) -> jax.Array:
    """Check the arguments and apply the equation; a shift of None is zero."""
    check_real(x, name)
    spec = make_spec(name, x, layout)
    return _bound(
        spec,
        function,
        x,
        check_scalar_or_features(alpha, "alpha", layout, x.dtype),
        None if shift is None else check_scalar_or_features(shift, "shift", layout, x.dtype),
        check_params(params, layout, x.dtype),
    )


@functools.partial(program, static_argnums=(0, 1))
def _bound(spec, function, x, alpha, shift, params):
    with jax.named_scope(spec.name):
        return _bounded(spec, function, x, alpha, shift, params)


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _bounded(
    spec: NormSpec,
    function: Callable,
    x: jax.Array,
    alpha: jax.Array,
    shift: jax.Array | None,
    params: NormParams,
) -> jax.Array:
    argument = spec.prepare(x) * _per_feature(spec, alpha, x)
    if shift is not None:
        argument = argument + _per_feature(spec, shift, x)
    return affine(spec, function(argument), params)


def _per_feature(spec: NormSpec, a: jax.Array, x: jax.Array) -> jax.Array:
    return expand(spec.prepare(spec.layout.broadcast(a) if a.ndim else a), x)
