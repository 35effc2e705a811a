"""Taylor mode, `jax.experimental.jet`: rules for jaxnorm's primitives, and rules that JAX lacks.

Rules that JAX has are left as they are. `jet` ignores derivatives that are defined by hand and
expands the function itself. So the computation of a norm, not only its `custom_jvp`, must have the
right derivatives of every order.
"""

import functools
from collections.abc import Callable

import jax
from jax import lax

from jaxnorm._internals import (
    ClosedJaxpr,
    Primitive,
    cond_p,
    jaxpr_as_fun,
    jet,
    optimization_barrier_p,
    reduce_or_p,
    reduce_precision_p,
    remat_p,
    set_current_trace,
)


def define(primitive: Primitive, function_of: Callable) -> None:
    """Define the rule of a primitive by the function that `function_of` makes of its parameters."""
    if jet:
        _set_missing(primitive, lambda *terms, **params: jet.jet2(function_of(**params), *terms))


def _set_missing(primitive: Primitive, rule: Callable) -> None:
    """Set a rule, unless JAX has one: from values and series to those of the results."""
    jet.jet_rules.setdefault(primitive, rule)


def _expanded(jaxpr: ClosedJaxpr) -> Callable:
    def function(primals, series):
        primals, series = jet.jet2(jaxpr_as_fun(jaxpr), primals, series)
        return primals, [list(terms) for terms in series]  # of one type, for all branches

    return function


def _checkpoint(primals, series, *, jaxpr, prevent_cse, policy, **_):
    function = _expanded(ClosedJaxpr(jaxpr, ()))
    return jax.checkpoint(function, prevent_cse=prevent_cse, policy=policy)(primals, series)


def _cond(primals, series, *, branches, **_):
    (index, *primals), (_, *series) = primals, series
    return lax.switch(index, [_expanded(branch) for branch in branches], primals, series)


def _barrier(primals, series):
    return lax.optimization_barrier((primals, series))


def _reduce_precision(primals, series, **params):
    return reduce_precision_p.bind(*primals, **params), series[0]


def _within_its_trace(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(trace, *args, **kwargs):
        with set_current_trace(trace):
            return method(trace, *args, **kwargs)

    return call


if jet:
    _set_missing(remat_p, _checkpoint)
    _set_missing(cond_p, _cond)
    _set_missing(optimization_barrier_p, _barrier)
    _set_missing(reduce_precision_p, _reduce_precision)
    _set_missing(reduce_or_p, functools.partial(jet.zero_prop, reduce_or_p))
    # JAX calls a function with a `custom_jvp`, such as `jax.nn.relu`, outside of the trace of its
    # arguments, which is an error.
    jet.JetTrace.process_custom_jvp_call = _within_its_trace(jet.JetTrace.process_custom_jvp_call)
