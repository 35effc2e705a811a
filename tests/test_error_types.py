"""Errors of every norm and module: their types, and input that is not an error."""

import os
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx

X = jnp.arange(24.0).reshape(4, 6)
PARAMS, STATE = jn.init_params(6), jn.init_batch_norm_state(6)
SMALL = [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn]
IMAGES = jnp.ones((4, 5, 6))

FUNCTIONS = {
    "batch_norm": lambda x: jn.batch_norm(x, STATE),
    "batch_norm in evaluation": lambda x: jn.batch_norm(x, STATE, train=False),
    "layer_norm": jn.layer_norm,
    "rms_norm": jn.rms_norm,
    "group_norm": lambda x: jn.group_norm(x, num_groups=2),
    "instance_norm": jn.instance_norm,
    "add_layer_norm": lambda x: jn.add_layer_norm(x, x),
    "add_rms_norm": lambda x: jn.add_rms_norm(x, x),
    "moments": lambda x: jn.moments(x, 0),
    "normalize": lambda x: jn.normalize(x, STATE),
    "denormalize": lambda x: jn.denormalize(x, STATE),
    "unit_norm": jn.unit_norm,
    "weight_norm": lambda x: jn.weight_norm(x, jnp.ones(6)),
    "standardize_weight": jn.standardize_weight,
    "spectral_norm": lambda x: jn.init_spectral_norm_state(x, jax.random.key(0)),
    "global_response_norm": lambda x: jn.global_response_norm(x, PARAMS),
    "filter_response_norm": lambda x: jn.filter_response_norm(x, PARAMS),
    "local_response_norm": lambda x: jn.local_response_norm(x, size=3),
    "dynamic_tanh": lambda x: jn.dynamic_tanh(x, 0.5),
    "dynamic_erf": lambda x: jn.dynamic_erf(x, 0.5, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float8_is_one_sentence_everywhere(name):
    FUNCTIONS[name](IMAGES)  # which is nothing else wrong
    for dtype in SMALL:
        with pytest.raises(TypeError, match=r"^. must be of float16, .*float(8|4)\w+; convert it"):
            FUNCTIONS[name](IMAGES.astype(dtype))


MODULES: dict[str, dict[str, Any]] = {
    "BatchNorm": {"use_running_average": False},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
}


def called(library, name, x, *, given=None, **options):
    """y of a module of linen or of nnx, Flax's or ours, maybe with a scale that is given."""
    call = {} if given is None else {"scale": given}
    make, options = getattr(library, name), MODULES[name] | options
    if "nnx" in library.__name__:
        return make(6, rngs=nnx.Rngs(0), **options)(x, **call)
    return make(**options).init_with_output(jax.random.key(0), x, **call)[0]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", SMALL)
def test_float8_in_a_module_with_a_dtype(name, dtype, rng):
    x = jnp.asarray(rng.standard_normal((4, 5, 6)), jnp.float32).astype(dtype)
    wide = x.astype(jnp.float32)
    for library in (jaxnorm.linen, jaxnorm.nnx):
        with pytest.raises(TypeError, match=r"^x must be of float16.*, or give the module a dtype"):
            called(library, name, x)
        with pytest.raises(TypeError, match=r"^dtype must be of float16.*; convert the result"):
            called(library, name, wide, dtype=dtype)
        result = called(library, name, x, dtype=jnp.float32)
        np.testing.assert_array_equal(result, called(library, name, wide, dtype=jnp.float32))
    # Flax's nnx computes this too, if it may promote.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        right = called(nnx, name, x, dtype=jnp.float32)
    # Numbers near one; Flax's variance E[x^2] - E[x]^2 loses a few digits of seven.
    np.testing.assert_allclose(result, right, atol=1e-4)


@pytest.mark.parametrize("norm", ["GlobalResponseNorm", "FilterResponseNorm", "DynamicTanh"])
def test_float8_in_other_modules(norm):
    x = IMAGES.astype(SMALL[0])
    linen = lambda **o: getattr(jaxnorm.linen, norm)(**o).init_with_output(jax.random.key(0), x)[0]
    ours = lambda **o: getattr(jaxnorm.nnx, norm)(6, rngs=nnx.Rngs(0), **o)(x)
    for call in (linen, ours):
        with pytest.raises(TypeError, match=r"^x must be of float16"):
            call()
        assert call(dtype=jnp.bfloat16).dtype == jnp.bfloat16


def linen_batch_norm(flag, **options):
    norm = jaxnorm.linen.BatchNorm(**options)
    variables = norm.init(jax.random.key(0), X, use_running_average=False)
    return norm.apply(variables, X, use_running_average=flag, mutable=["batch_stats"])[0]


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, update_stats):
        return jaxnorm.linen.SpectralNorm(nn.Dense(3))(x, update_stats=update_stats)


def linen_spectral_norm(flag):
    variables = Spectral().init(jax.random.key(0), X, update_stats=True)
    return Spectral().apply(variables, X, update_stats=flag, mutable=["batch_stats"])[0]


def nnx_batch_norm(flag, **options):
    return jaxnorm.nnx.BatchNorm(6, rngs=nnx.Rngs(0), **options)(X, flag)


def nnx_spectral_norm(flag):
    layer = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    return jaxnorm.nnx.SpectralNorm(layer, rngs=nnx.Rngs(0))(X, flag)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (linen_batch_norm, "use_running_average"),
        (linen_spectral_norm, "update_stats"),
        (nnx_batch_norm, "use_running_average"),
        (nnx_spectral_norm, "update_stats"),
    ],
)
def test_a_flag_is_known_while_tracing(call, name):
    with pytest.raises(TypeError, match=rf"^{name} must be a Python bool, got \w*Tracer; mark it"):
        jax.jit(call)(True)
    results = [call(flag) for flag in (False, True)]
    assert (results[0] != results[1]).any()
    # What Flax takes: anything with a truth.
    others: list[Any] = [np.bool_(True), 1, jnp.array(True)]
    for flag in others:
        np.testing.assert_array_equal(call(flag), results[1])


UNBOUND = {
    "batch_norm": lambda: jn.batch_norm(X, STATE, "data"),
    "batch_norm in evaluation": lambda: jn.batch_norm(X, STATE, ("data",), train=False),
    "moments": lambda: jn.moments(X, 0, axis_name="data"),
    "linen": lambda: linen_batch_norm(False, axis_name="data"),
    "nnx": lambda: nnx_batch_norm(False, axis_name="data"),
    "nnx layer norm": lambda: called(jaxnorm.nnx, "LayerNorm", X, axis_name="data"),
}


@pytest.mark.parametrize("name", UNBOUND)
@pytest.mark.parametrize("error", [ValueError, NameError])
def test_an_unbound_name_is_both_errors(name, error):
    with pytest.raises(
        error, match=r"axis_name must be bound by .*, which nothing binds; map over"
    ):
        UNBOUND[name]()


WRONG: dict[str, Any] = {
    "a name": {"axis_name": 0},
    "params for a name": {"axis_name": PARAMS},
    "groups without a name": {"axis_index_groups": [[0]]},
    "where of another shape": {"where": jnp.ones((4, 5), bool)},
    "where of another type": {"where": jnp.ones((4, 6))},
    "an implementation": {"implementation": "fast"},
    "a kernel where there is none": {"implementation": "kernel", "where": jnp.ones((4, 6), bool)},
    "momentum": {"momentum": 2},
    "ddof": {"ddof": -1},
    "epsilon": {"epsilon": -1.0},
}


@pytest.mark.parametrize("name", WRONG)
def test_evaluation_is_checked_as_training_is(name):
    errors = []
    for train in (True, False):
        with pytest.raises((TypeError, ValueError)) as raised:
            jn.batch_norm(X, STATE, train=train, **WRONG[name])
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_evaluation_takes_what_training_takes():
    right, _ = jn.batch_norm(X, STATE, train=False)
    call = lambda x, where: jn.batch_norm(x, STATE, "i", train=False, where=where)[0]
    result = jax.vmap(call, axis_name="i")(X[:, None], X[:, None] > 3)
    np.testing.assert_array_equal(result[:, 0], right)


NUMBERS = [
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    ml_dtypes.bfloat16(0.25),
    np.array(0.25),
    np.array(0.25, np.float32),
    jnp.float32(0.25),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda a: f"{type(a).__name__}-{a.dtype}")
def test_a_scalar_of_numpy_is_a_number(number):
    for call in (
        lambda n: jn.layer_norm(X, epsilon=n),
        lambda n: jn.layer_norm(X, PARAMS, scale_offset=n),
        lambda n: jn.batch_norm(X, STATE, epsilon=n, momentum=n),
        lambda n: jn.batch_norm(X, STATE, renorm=jn.Renorm(1 + n, n)),
        lambda n: jn.weight_norm(X, jnp.ones(6), epsilon=n),
        lambda n: jn.unit_norm(X, ord=4 * n),
        lambda n: jn.local_response_norm(X, size=3, alpha=n, beta=n),
        lambda n: called(jaxnorm.linen, "LayerNorm", X, epsilon=n),
        lambda n: called(jaxnorm.nnx, "BatchNorm", X, epsilon=n, momentum=n),
    ):
        jax.tree.map(np.testing.assert_array_equal, call(number), call(0.25))


@pytest.mark.parametrize("number", [np.array([0.25]), np.complex64(1), np.str_("1"), "1"])
def test_what_is_no_number(number):
    with pytest.raises(TypeError, match="epsilon must be a number"):
        jn.layer_norm(X, epsilon=number)
    with pytest.raises(TypeError, match="momentum must be a number"):
        jn.batch_norm(X, STATE, momentum=number)


def test_the_momentum_is_not_rounded():
    """In float16, 1 - 1e-4 is 1 minus a third of a unit, which it rounds away."""
    momentum: Any = np.float16(1e-4)
    _, state = jn.batch_norm(X, STATE, momentum=momentum)
    _, right = jn.batch_norm(X, STATE, momentum=float(momentum))
    jax.tree.map(np.testing.assert_array_equal, state, right)


def test_normalize_takes_a_state():
    state = jn.batch_norm(X, STATE)[1]
    right, _ = jn.batch_norm(X, state, params=PARAMS, train=False)
    y = jn.normalize(X, state, PARAMS)
    np.testing.assert_array_equal(y, right)
    # Two roundings each way.
    np.testing.assert_allclose(jn.denormalize(y, state, PARAMS), X, rtol=1e-6, atol=1e-5)
    with pytest.raises(TypeError, match="moments must be a Moments, got tuple"):
        jn.normalize(X, tuple(state))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("library", [jaxnorm.linen, jaxnorm.nnx])
def test_instance_norm_of_single_elements_warns_in_modules(library):
    """Flax's result, the bias, but not in silence."""
    words = r"must have an axis besides .*, got x of shape \(4, 6\); the result is the bias"
    with pytest.warns(UserWarning, match=words):
        y = called(library, "InstanceNorm", X)
    flax = nnx if library is jaxnorm.nnx else nn
    np.testing.assert_array_equal(y, called(flax, "InstanceNorm", X))
    called(library, "InstanceNorm", IMAGES)  # no warning, which would be an error
    # What else has a mean of its own for each element has sizes of one by chance, not by its axes.
    assert not jn.instance_norm(X[:, None]).any()
    assert not jn.group_norm(X, num_groups=6).any()
    assert not jn.layer_norm(X[..., None]).any()


FIRST: dict[str, tuple[dict[str, Any], str]] = {
    "BatchNorm": ({}, "axis=1"),
    "LayerNorm": ({}, "reduction_axes=1, feature_axes=1"),
    "RMSNorm": ({}, "reduction_axes=1, feature_axes=1"),
    "InstanceNorm": ({}, "feature_axes=1"),
    "GlobalResponseNorm": ({}, "feature_axis=1"),
    "FilterResponseNorm": ({}, "feature_axis=1"),
}


@pytest.mark.parametrize("name", FIRST)
def test_channels_first_names_the_argument_of_the_module(name):
    options, argument = FIRST[name]
    x, make = jnp.ones((2, 3, 5, 5)), getattr(jaxnorm.nnx, name)
    words = rf"must have shape \(5,\).*; if the features are axis 1 of x, pass {argument}; else "
    with pytest.raises(ValueError, match=words):
        make(3, rngs=nnx.Rngs(0), **options)(x)
    # With what it says, it runs.
    passed = {part.split("=")[0]: 1 for part in argument.split(", ")}
    assert make(3, rngs=nnx.Rngs(0), **options, **passed)(x).shape == x.shape


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("use_scale", [False, True])
def test_channels_first_in_batch_norm_of_linen(use_running_average, use_scale):
    norm = jaxnorm.linen.BatchNorm(use_running_average, use_scale=use_scale, use_bias=use_scale)
    variables = norm.init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"mean must have shape \(5,\).*, pass axis=1; else "):
        norm.apply(variables, jnp.ones((2, 3, 5, 5)), mutable=["batch_stats"])


def test_the_argument_is_named_only_where_an_axis_has_that_size():
    # The first axis of x has examples in it.
    wrong = [((4, 5, 6), 7), ((4, 5, 6), 4), ((5,), 4)]
    for shape, size in wrong:
        with pytest.raises(ValueError, match=r"scale must have shape .*\); make it with that many"):
            jn.layer_norm(jnp.ones(shape), jn.init_params(size))
    # Group norm of the modules takes the last axis.
    with pytest.raises(ValueError, match=r"got \(5,\); make it with that many"):
        called(jaxnorm.nnx, "GroupNorm", IMAGES, given=jnp.ones(5))


SAVE = """
import pickle, sys, jax, jax.numpy as jnp, jaxnorm as jn
from jax.experimental.serialize_executable import serialize
program = jax.jit(lambda x: jn.layer_norm(x, implementation=sys.argv[2]))
pickle.dump(serialize(program.lower(jnp.ones((64, 64))).compile()), open(sys.argv[1], "wb"))
"""
LOAD = """
import importlib, pickle, sys, jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load
for name in sys.argv[2:]:
    importlib.import_module(name)
program = deserialize_and_load(*pickle.load(open(sys.argv[1], "rb")))
assert not program(jnp.ones((64, 64))).any()
assert ("jaxnorm" in sys.modules) == bool(sys.argv[2:])
"""


@pytest.mark.thorough
def test_a_saved_program_needs_the_import(tmp_path, kernel):
    """In processes of their own, as docs/errors.md says."""

    def run(code, *args):
        # XLA can't save a program again that came out of a cache: it lacks functions then.
        environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-c", code, tmp_path / "program", *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert run(SAVE, "kernel")[0] == 0
    failed, words = run(LOAD)
    assert failed
    assert "NOT_FOUND: No FFI handler registered for jaxnorm_forward on a platform Host" in words
    for code, *args in ((LOAD, "jaxnorm"), (SAVE, "xla"), (LOAD,)):
        failed, words = run(code, *args)
        assert not failed, words
