"""The modules of the small norms: initial values, results of the functions, dtypes, transforms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_add_modules import FLAVOURS, variables_of

import jaxnorm as jn
import jaxnorm.nnx

# What each starts with, in its paper, and the function of its variables.
MODULES: dict[str, Any] = {
    "GlobalResponseNorm": (
        {"scale": 0.0, "bias": 0.0},
        lambda v, x, **options: jn.global_response_norm(x, affine(v), **options),
    ),
    "FilterResponseNorm": (
        {"scale": 1.0, "bias": 0.0, "threshold": 0.0},
        lambda v, x, **options: jn.filter_response_norm(
            x, affine(v), v.get("threshold"), **options
        ),
    ),
    "DynamicTanh": (
        {"scale": 1.0, "bias": 0.0, "alpha": 0.5},
        lambda v, x, **options: jn.dynamic_tanh(x, v["alpha"], affine(v), **options),
    ),
    "DynamicErf": (
        {"scale": 1.0, "bias": 0.0, "alpha": 0.5, "shift": 0.0},
        lambda v, x, **options: jn.dynamic_erf(x, v["alpha"], v["shift"], affine(v), **options),
    ),
}
NAMES = pytest.mark.parametrize("name", MODULES)
X = np.random.default_rng(0).standard_normal((2, 5, 6), np.float32)


def affine(variables):
    return jn.NormParams(variables.get("scale"), variables.get("bias"))


def flat(initial):
    """Initializers of Flax, as variables_of passes them, that are those of the module."""
    return {f"{name}_init": jax.nn.initializers.constant(value) for name, value in initial.items()}


@NAMES
@FLAVOURS
def test_starts_as_in_its_paper(flavour, name):
    initial, function = MODULES[name]
    make = getattr(flavour, name)
    if flavour is jaxnorm.nnx:
        module = make(6, rngs=nnx.Rngs(0))
        variables, y = nnx.to_pure_dict(nnx.state(module)), module(X)
    else:
        y, variables = make().init_with_output(jax.random.key(0), X)
        variables = variables["params"]
    assert set(variables) == set(initial)
    for key, value in initial.items():
        shape = () if key in ("alpha", "shift") else (6,)
        np.testing.assert_array_equal(variables[key], np.full(shape, value, np.float32))
    np.testing.assert_array_equal(y, function(variables, X))


@NAMES
@FLAVOURS
def test_arguments_reach_the_function(flavour, name):
    initial, function = MODULES[name]
    options: dict[str, Any] = {"feature_axis": 1}
    if name.endswith("Norm"):
        options["epsilon"] = 0.3
    arguments = flat({key: 0.25 + value for key, value in initial.items()})
    x = np.moveaxis(X, 1, 2)
    variables, call = variables_of(flavour, name, x, **options, **arguments)
    np.testing.assert_array_equal(call(variables, x), function(variables, x, **options))
    assert float(variables["bias"][0]) == 0.25


@NAMES
@FLAVOURS
def test_what_is_not_wanted_is_not_there(flavour, name):
    arguments = {"use_scale": False, "use_bias": False}
    if name == "FilterResponseNorm":
        arguments["use_threshold"] = False
    variables, call = variables_of(flavour, name, X, **arguments)
    variables = {key: value for key, value in variables.items() if value is not None}
    assert not {"scale", "bias", "threshold"} & set(variables)
    np.testing.assert_array_equal(call(variables, X), MODULES[name][1](variables, X))


@NAMES
@FLAVOURS
def test_dtypes(flavour, name):
    """That of the module, or that which Flax makes of x and the variables."""
    half = jnp.asarray(X, jnp.bfloat16)
    ints = np.ones(X.shape, np.int32)
    for dtype, x, expected in (
        (jnp.bfloat16, X, jnp.bfloat16),
        (jnp.bfloat16, half, jnp.bfloat16),
        (None, half, jnp.float32),
        (None, ints, jnp.float32),
    ):
        variables, call = variables_of(flavour, name, x, dtype=dtype)
        assert all(value.dtype == jnp.float32 for value in variables.values())
        assert call(variables, x).dtype == expected


@NAMES
def test_nnx_under_its_own_transforms(name):
    module = getattr(jaxnorm.nnx, name)(6, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda module, x: jnp.sum(jnp.sin(module(x)))))(module, X)
    assert set(nnx.to_pure_dict(gradient)) == set(MODULES[name][0])
