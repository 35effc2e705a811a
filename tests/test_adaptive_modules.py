"""Scale and bias per call, and the offset of the scale, in linen and nnx modules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

NAMES = [
    "BatchNorm",
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "AddLayerNorm",
    "AddRMSNorm",
]
all_modules = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("flavour", [jaxnorm.linen, jaxnorm.nnx], ids=["linen", "nnx"])

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((4, 5, 6)) + 2, jnp.float32)
SCALE, BIAS = (jnp.asarray(RNG.standard_normal((4, 1, 6)), jnp.float32) for _ in range(2))


def make(flavour, name, **arguments) -> tuple[Any, Any]:
    """The parameters, and a function of them and of the arguments of a call."""
    if name == "GroupNorm":
        arguments = {"num_groups": 2, **arguments}
    if name == "BatchNorm":
        arguments = {"use_running_average": False, **arguments}
    args = (X, X) if name.startswith("Add") else (X,)
    if flavour is jaxnorm.linen:
        module = getattr(flavour, name)(**arguments)
        variables = module.init(jax.random.key(0), *args, scale=SCALE)
        rest = {kind: variables[kind] for kind in variables if kind != "params"}

        def apply(params, **named):
            given = {"params": params, **rest}
            return module.apply(given, *args, mutable=["batch_stats"], **named)[0]

        return variables.get("params", {}), apply
    module = getattr(flavour, name)(6, rngs=nnx.Rngs(0), **arguments)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def call(params, **named):
        new = jax.tree.map(lambda a: a, nnx.split(module, nnx.Param, ...)[1])
        nnx.replace_by_pure_dict(new, params)
        return nnx.merge(graph, new, rest, copy=True)(*args, **named)

    return nnx.to_pure_dict(params), call


def by_function(name, params, **options):
    """What the function of that module gives."""
    options = {"epsilon": 1e-5 if name == "BatchNorm" else 1e-6, **options}
    if name == "BatchNorm":
        return jn.batch_norm(X, jn.init_batch_norm_state(6), params=params, **options)[0]
    if name.startswith("Add"):
        return {"AddLayerNorm": jn.add_layer_norm, "AddRMSNorm": jn.add_rms_norm}[name](
            X, X, params, **options
        )
    if name == "GroupNorm":
        options["num_groups"] = 2
    function = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm", "GroupNorm": "group_norm"}
    return getattr(jn, function.get(name, "instance_norm"))(X, params, **options)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@both
@all_modules
def test_an_adaptive_norm_is_one_line(flavour, name):
    """Nothing is learned; scale and bias, of each example, come with the call."""
    without = {"use_scale": False} | ({} if "RMS" in name else {"use_bias": False})
    params, call = make(flavour, name, scale_offset=1.0, **without)
    assert not jax.tree.leaves(params)
    expected = by_function(name, jn.NormParams(SCALE, BIAS), scale_offset=1.0)
    assert_equal(call(params, scale=SCALE, bias=BIAS), expected)


@both
@all_modules
def test_what_a_call_gives_is_added_to_what_is_learned(flavour, name):
    params, call = make(flavour, name)
    total = jn.NormParams(1 + SCALE, BIAS)
    assert_equal(call(params, scale=SCALE, bias=BIAS), by_function(name, total))
    only = jn.NormParams(jnp.ones(6), BIAS)
    assert_equal(call(params, bias=BIAS), by_function(name, only))

    def loss(params, given):
        return jnp.sum(jnp.sin(jax.tree.leaves(call(params, **given))[0]))

    learned, given = jax.grad(loss, (0, 1))(params, {"scale": SCALE, "bias": BIAS})
    assert given["scale"].shape == SCALE.shape
    # They are summands of one sum; float32 adds up four numbers.
    whole = given["scale"].sum((0, 1))
    np.testing.assert_allclose(learned["scale"], whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@both
@all_modules
def test_the_initial_scale_with_an_offset_changes_nothing(flavour, name):
    params, call = make(flavour, name, scale_offset=1.0)
    np.testing.assert_array_equal(params["scale"], np.zeros(6))
    assert_equal(call(params), make(flavour, name)[1](make(flavour, name)[0]))
    own, _ = make(flavour, name, scale_offset=1.0, scale_init=nnx.initializers.constant(3.0))
    np.testing.assert_array_equal(own["scale"], np.full(6, 3))


@both
def test_batch_norm_in_evaluation(flavour):
    params, call = make(flavour, "BatchNorm", use_running_average=True, scale_offset=0.5)
    y = call(params, scale=SCALE, bias=BIAS)
    right = X / np.sqrt(1 + 1e-5) * (1 + SCALE) + BIAS
    np.testing.assert_allclose(y, right, rtol=0, atol=1e-6 * np.abs(right).max())


@both
def test_dtypes_are_promoted_like_those_of_parameters(flavour):
    half = {"dtype": None, "param_dtype": jnp.bfloat16, "use_scale": False, "use_bias": False}
    module = make(flavour, "LayerNorm", **half)[1]
    assert module({}, scale=SCALE).dtype == jnp.float32
    fixed = make(flavour, "LayerNorm", **{**half, "dtype": jnp.bfloat16})[1]
    assert fixed({}, scale=SCALE).dtype == jnp.bfloat16


@both
def test_wrong_shapes_and_a_missing_scale(flavour):
    params, call = make(flavour, "LayerNorm")
    message = r"scale must have shape \(6,\), .*got \(4, 6\); .* as many axes as x has"
    with pytest.raises(ValueError, match=message):
        call(params, scale=SCALE[:, 0])
    params, call = make(flavour, "LayerNorm", use_scale=False, scale_offset=1.0)
    with pytest.raises(ValueError, match="scale_offset must be added to a scale"):
        call(params, bias=BIAS)
