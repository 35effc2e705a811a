"""linen's transformations of a class and of a function: what works with Flax's works with ours.

The table is made from Flax's own behaviour: what its class refuses is not required of ours.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from chex import assert_trees_all_close
from test_nnx_transformations import MASK, TOL, X

import jaxnorm.linen as jn

KEY = jax.random.key(0)
pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.thorough]  # compile faster
# One module for all examples, and one for each.
SHARED: dict[str, Any] = {
    "variable_axes": {"params": None, "batch_stats": None},
    "split_rngs": {"params": False},
}
EACH: dict[str, Any] = {
    "variable_axes": {"params": 0, "batch_stats": 0},
    "split_rngs": {"params": True},
}


def of_class(transform):
    """The transformed class, called directly."""
    return lambda cls, options, *_: transform(cls)(**options)


def inside(run):
    """A module that calls `run(module, x, mode, named)`, where named is {} or the mask by name."""

    class Outer(nn.Module):
        cls: Any
        options: Any

        @nn.compact
        def __call__(self, x, *mode, **named):
            return run(self.cls(**self.options), x, mode, named)

    return lambda cls, options: Outer(cls, options)


def call(module, x, mode, named):
    return module(x, *mode, **named)


def over_examples(transform, **how):
    """Of a function of the module and of each example."""

    def run(module, x, mode, named):
        one = lambda module, x, named: call(module, x, mode, named)
        return transform(one, **how)(module, x, named)

    return inside(run)


def layers(module, x, mode, named):
    """Three modules, one after the other."""
    step = lambda module, x, _: (call(module, x, mode, named), None)
    return nn.scan(step, **EACH, length=3)(module, x, None)[0]


def carried(module, x, mode, named):
    """The statistics are carried from example to example."""
    step = lambda module, number, x, named: (number, call(module, x, mode, named))
    how: dict[str, Any] = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
    return nn.scan(step, **how, split_rngs={"params": False})(module, 0, x, named)[1]


def branches(module, x, mode, named):
    one = lambda module, x: call(module, x, mode, named)
    return nn.cond(True, one, one, module, x)


def pullback(module, x, mode, named):
    y, backward = nn.vjp(lambda module, x: call(module, x, mode, named), module, x)
    return backward(jnp.cos(y))[1]


def tangent(module, x, mode, named):
    one = lambda module, x: call(module, x, mode, named)
    return nn.jvp(one, module, (x,), (jnp.cos(x),), variable_tangents={})[1]


CALLS: dict[str, Any] = {
    "jit": of_class(nn.jit),
    "jit, static": of_class(functools.partial(nn.jit, static_argnums=(2,))),
    "remat": of_class(nn.remat),
    "remat, static": of_class(functools.partial(nn.remat, static_argnums=(2,))),
    "vmap": of_class(functools.partial(nn.vmap, in_axes=0, **EACH)),
    "vmap, shared": of_class(functools.partial(nn.vmap, in_axes=0, **SHARED)),
    "vmap, a mode": of_class(functools.partial(nn.vmap, in_axes=(0, None), **EACH)),
    "vmap of remat": of_class(lambda cls: nn.vmap(nn.remat(cls), in_axes=0, **EACH)),
    "remat_scan": of_class(functools.partial(nn.remat_scan, lengths=(2, 1))),
    "jit of a function": over_examples(nn.jit),
    "remat of a function": over_examples(nn.remat),
    "vmap of a function": over_examples(nn.vmap, **EACH),
    "vmap of a function, shared": over_examples(nn.vmap, **SHARED),
    "scan of layers": inside(layers),
    "scan of examples": inside(carried),
    "cond": inside(branches),
    "vjp": inside(pullback),
    "jvp": inside(tangent),
}


def outcome(model, mode, named):
    """The variables, the result, the updates and the gradients, or the error."""

    @jax.jit
    def run(x, named):
        variables = model.init(KEY, x, *mode, **named)

        def loss(params):
            given = {**variables, "params": params}
            y, updates = model.apply(given, x, *mode, **named, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updates)

        gradient, results = jax.grad(loss, has_aux=True)(variables["params"])
        # The gradient is a sum over all of x.
        return variables, *results, jax.tree.map(lambda g: g / x.size, gradient)

    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return run(X, named)
    except Exception as error:  # whatever Flax raises
        return error


def norm(norms, name, trains, mode):
    """A class and its arguments; with a mode, each call says whether it trains."""
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    if name == "BatchNorm" and not mode:
        options = {"use_running_average": not trains}
    return getattr(norms, name), options | {"scale_init": nn.initializers.uniform(3.0)}


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize("how", CALLS)
def test_what_works_with_a_norm_of_flax_works_with_ours(how, name):
    worked = 0
    modes = [(True, ()), (False, ())]
    modes += [(True, (False,)), (False, (True,))]  # of each call
    for trains, mode in modes if name == "BatchNorm" else modes[:1]:
        for named in ({}, {"mask": MASK}):
            theirs, ours = (
                outcome(CALLS[how](*norm(norms, name, trains, mode)), mode, named)
                for norms in (nn, jn)
            )
            if isinstance(theirs, Exception):
                continue
            worked += 1
            assert not isinstance(ours, Exception), (trains, mode, [*named], ours)
            assert_trees_all_close(ours, theirs, atol=TOL, rtol=0)
    # What is static here is the mode, which batch norm alone has; a scan carries only statistics
    # that are there before it.
    if how not in ("remat, static", "vmap, a mode", "scan of examples"):
        assert worked


class Layer(nn.Module):
    """A layer with normalized weights."""

    name_of_class: str

    @nn.compact
    def __call__(self, x):
        if self.name_of_class == "StandardizedConv":
            return jn.StandardizedConv(6, (3,))(x)
        if self.name_of_class == "StandardizedDense":
            return jn.StandardizedDense(6)(x)
        training = {"update_stats": True} if self.name_of_class == "SpectralNorm" else {}
        return getattr(jn, self.name_of_class)(nn.Dense(6))(x, **training)


all_layers = pytest.mark.parametrize(
    "name", ["WeightNorm", "SpectralNorm", "StandardizedDense", "StandardizedConv"]
)


@all_layers
@pytest.mark.parametrize(
    "how", ["jit", "remat", "cond", "jit of a function", "remat of a function"]
)
def test_layers_with_normalized_weights_are_the_same_transformed(how, name):
    plain = of_class(lambda cls: cls) if how in ("jit", "remat") else inside(call)
    model = plain(Layer, {"name_of_class": name})
    transformed = CALLS[how](Layer, {"name_of_class": name})
    variables = model.init(KEY, X)
    expected, results = (
        m.apply(variables, X, mutable=["batch_stats"]) for m in (model, transformed)
    )
    assert_trees_all_close(results, expected, atol=TOL, rtol=0)


@all_layers
def test_layers_with_normalized_weights_are_mapped(name):
    layer = Layer(name)
    mapped = nn.vmap(Layer, in_axes=0, **EACH)(name)
    variables = mapped.init(KEY, X)
    results = mapped.apply(variables, X, mutable=["batch_stats"])
    for i, x in enumerate(X):
        own, result = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (variables, results))
        expected = layer.apply(own, x, mutable=["batch_stats"])
        assert_trees_all_close(result, expected, atol=TOL, rtol=0)
