"""Errors for bad input, raised while tracing: what must hold, what was given, what to do."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxnorm as jn

X = jnp.ones((4, 6))
IMAGES = jnp.ones((2, 3, 5, 5))
STATE = jn.init_batch_norm_state(6)
DICT: Any = {}  # for the type checker, anything
HALF: Any = 0.5
FLAT: Any = [0, 1]
SPECTRAL = jn.init_spectral_norm_state(X, jax.random.key(0))
SWAPPED: Any = (jn.moments(X, 0), STATE)


def bad(name, call, error, *words):
    return pytest.param(call, error, words, id=name)


CASES = [
    bad(
        "scale of another size",
        lambda: jn.layer_norm(X, jn.init_params(5)),
        ValueError,
        "scale must have shape (6,)",
        "got (5,)",
    ),
    bad(
        "bias of another size",
        lambda: jn.rms_norm(X, jn.NormParams(bias=jnp.ones(4))),
        ValueError,
        "bias must have shape (6,)",
        "got (4,)",
    ),
    bad(
        "state of another size",
        lambda: jn.batch_norm(X, jn.init_batch_norm_state(4)),
        ValueError,
        "state.mean must have shape (6,)",
        "got (4,)",
    ),
    bad(
        "state of another size in evaluation",
        lambda: jn.batch_norm(X, jn.init_batch_norm_state(4), train=False),
        ValueError,
        "state.mean must have shape (6,)",
    ),
    bad("no state", lambda: jn.batch_norm(X, DICT), TypeError, "BatchNormState", "dict"),
    bad("params of another type", lambda: jn.layer_norm(X, DICT), TypeError, "NormParams", "dict"),
    bad(
        "complex params for a real x",
        lambda: jn.layer_norm(X, jn.init_params(6, dtype=jnp.complex64)),
        TypeError,
        "scale must be real",
        "complex64",
    ),
    bad(
        "real state for a complex x",
        lambda: jn.batch_norm(X.astype(jnp.complex64), STATE),
        TypeError,
        "state.mean must be complex",
        "float32",
    ),
    bad(
        "groups that do not divide",
        lambda: jn.group_norm(X, num_groups=4),
        ValueError,
        "num_groups",
        "divides the features",
        "got 4 for 6",
    ),
    bad("no groups", lambda: jn.group_norm(X, num_groups=0), ValueError, "positive", "got 0"),
    bad("axis out of range", lambda: jn.layer_norm(X, axis=2), ValueError, "[-2, 2)", "got 2"),
    bad("axis twice", lambda: jn.layer_norm(X, axis=(1, -1)), ValueError, "once", "(1, -1)"),
    bad("axis not an integer", lambda: jn.rms_norm(X, axis=HALF), TypeError, "integer", "0.5"),
    bad(
        "feature axis out of range",
        lambda: jn.instance_norm(X, feature_axis=-3),
        ValueError,
        "feature_axis",
        "got -3",
    ),
    bad(
        "features along the examples",
        lambda: jn.group_norm(X, num_groups=2, feature_axis=0),
        ValueError,
        "first axis",
        "batch axis",
    ),
    bad(
        "where that does not broadcast",
        lambda: jn.layer_norm(X, where=jnp.ones((4, 5), bool)),
        ValueError,
        "where must broadcast",
        "(4, 6)",
        "(4, 5)",
    ),
    bad(
        "where of higher rank",
        lambda: jn.layer_norm(X, where=jnp.ones((1, 4, 6), bool)),
        ValueError,
        "where must broadcast",
    ),
    bad(
        "where that is not boolean",
        lambda: jn.batch_norm(X, STATE, where=jnp.ones((4, 6))),
        TypeError,
        "where must be boolean",
        "float32",
    ),
    bad(
        "channels first",
        lambda: jn.batch_norm(IMAGES, jn.init_batch_norm_state(3)),
        ValueError,
        "state.mean must have shape (5,)",
        "if the features are axis 1 of x, pass feature_axis=1; else",
    ),
    bad(
        "channels first in evaluation",
        lambda: jn.batch_norm(IMAGES, jn.init_batch_norm_state(3), train=False),
        ValueError,
        "pass feature_axis=1; else",
    ),
    bad(
        "channels first, layer norm",
        lambda: jn.add_layer_norm(IMAGES, IMAGES, jn.init_params(3)),
        ValueError,
        "scale must have shape (5,)",
        "if the features are axis 1 of x, pass axis=1; else",
    ),
    bad(
        "channels first, given moments",
        lambda: jn.normalize(IMAGES, jn.init_batch_norm_state(3)),
        ValueError,
        "the mean must have shape (5,)",
        "pass feature_axis=1; else",
    ),
    bad(
        "channels first, group norm",
        lambda: jn.group_norm(IMAGES, jn.init_params(3), num_groups=1),
        ValueError,
        "pass feature_axis=1; else",
    ),
    bad(
        "outputs first",
        lambda: jn.weight_norm(X, jnp.ones(4)),
        ValueError,
        "if the features are axis 0 of x, pass feature_axis=0; else",
    ),
    bad(
        "integers",
        lambda: jn.layer_norm(jnp.ones((4, 6), jnp.int32)),
        TypeError,
        "x must be floating-point",
        "int32",
        "astype",
    ),
    bad("a scalar", lambda: jn.layer_norm(jnp.float32(1)), ValueError, "one axis", "scalar"),
    bad(
        "epsilon below zero",
        lambda: jn.layer_norm(X, epsilon=-1e-6),
        ValueError,
        "epsilon must be at least 0",
        "-1e-06",
    ),
    bad(
        "epsilon not a number",
        lambda: jn.layer_norm(X, epsilon=float("nan")),
        ValueError,
        "epsilon must be",
        "nan",
    ),
    bad(
        "epsilon traced",
        lambda: jax.jit(lambda e: jn.layer_norm(X, epsilon=e))(1e-6),
        TypeError,
        "epsilon must be a number",
    ),
    bad(
        "momentum outside [0, 1]",
        lambda: jn.batch_norm(X, STATE, momentum=1.5),
        ValueError,
        "momentum must lie in [0, 1]",
        "1.5",
    ),
    bad(
        "ddof below zero",
        lambda: jn.batch_norm(X, STATE, ddof=-1),
        ValueError,
        "ddof",
        "got -1",
    ),
    bad(
        "train traced",
        lambda: jax.jit(lambda t: jn.batch_norm(X, STATE, train=t))(True),
        TypeError,
        "train must be a Python bool",
        "static",
    ),
    bad(
        "a name that nothing binds",
        lambda: jn.batch_norm(X, STATE, "data"),
        ValueError,
        "'data'",
        "shard_map",
        "pmap",
        "vmap",
        "jax.jit",
    ),
    bad(
        "a name that nothing binds, in a tuple",
        lambda: jax.vmap(lambda x: jn.moments(x, 0, axis_name=("i", "j")), axis_name="i")(X),
        ValueError,
        "got 'j', which nothing binds",
    ),
    bad(
        "a name twice",
        lambda: jax.vmap(lambda x: jn.moments(x, 0, axis_name=("i", "i")), axis_name="i")(X),
        ValueError,
        "each name once",
    ),
    bad(
        "params in the place of the name",
        lambda: jn.batch_norm(X, STATE, jn.init_params(6)),
        TypeError,
        "axis_name must be a name",
        "pass params by keyword",
    ),
    bad(
        "float8",
        lambda: jn.layer_norm(X.astype(jnp.float8_e4m3fn)),
        TypeError,
        "x must be of float16, bfloat16 or better",
        "got float8_e4m3fn",
        "x.astype",
    ),
    bad(
        "state in float8",
        lambda: jn.batch_norm(X, jax.tree.map(lambda a: a.astype(jnp.float8_e5m2), STATE)),
        TypeError,
        "state.mean must be float32 or better",
        "float8_e5m2",
    ),
    bad(
        "elements with a mean each",
        lambda: jn.instance_norm(X),
        ValueError,
        "an axis besides those of the examples and the features",
        "(4, 6)",
        "layer_norm",
    ),
    bad(
        "the number of an axis for a name",
        lambda: jn.batch_norm(X, STATE, 0),
        TypeError,
        "axis_name must be a name",
        "int",
    ),
    bad(
        "groups that are one list",
        lambda: jax.vmap(
            lambda x: jn.moments(x, 0, axis_name="i", axis_index_groups=FLAT), axis_name="i"
        )(X),
        TypeError,
        "lists of integers",
        "[0, 1]",
    ),
    bad(
        "groups without a name",
        lambda: jn.batch_norm(X, STATE, axis_index_groups=[[0]]),
        ValueError,
        "axis_name",
    ),
    bad(
        "groups that leave out an index",
        lambda: jax.vmap(
            lambda x: jn.moments(x, 0, axis_name="i", axis_index_groups=[[0, 1], [2]]),
            axis_name="i",
        )(X),
        ValueError,
        "each index from 0 to 3",
        "[[0, 1], [2]]",
    ),
    bad(
        "moments of different shapes",
        lambda: jn.merge_moments(jn.moments(X, 0), jn.moments(X, 1)),
        ValueError,
        "one shape",
        "(6,)",
        "(4,)",
    ),
    bad(
        "state and moments swapped",
        lambda: jn.update_batch_norm_state(*SWAPPED),
        TypeError,
        "state must be a BatchNormState",
        "Moments",
    ),
    bad("no moments", lambda: jn.merge_moments(DICT, DICT), TypeError, "a Moments", "dict"),
    bad(
        "state in half precision",
        lambda: jn.init_batch_norm_state(6, jnp.bfloat16),
        TypeError,
        "float32 or better",
        "bfloat16",
    ),
    bad(
        "state of integers",
        lambda: jn.batch_norm(X, jax.tree.map(lambda a: a.astype(jnp.int32), STATE)),
        TypeError,
        "state.mean must be float32",
        "int32",
    ),
    bad(
        "groups traced",
        lambda: jax.jit(lambda g: jn.group_norm(X, num_groups=g))(2),
        TypeError,
        "num_groups must be an integer",
        "static",
    ),
    bad(
        "axis traced",
        lambda: jax.jit(lambda a: jn.layer_norm(X, axis=a))(1),
        TypeError,
        "axis must be an integer",
        "static",
    ),
    bad("epsilon no number", lambda: jn.rms_norm(X, epsilon=DICT), TypeError, "epsilon", "dict"),
    bad(
        "momentum no number",
        lambda: jn.batch_norm(X, STATE, momentum=DICT),
        TypeError,
        "momentum must be a number",
        "dict",
    ),
    bad(
        "moments of another shape than the state",
        lambda: jn.update_batch_norm_state(STATE, jn.moments(X, 1)),
        ValueError,
        "(6,)",
        "got (4,)",
    ),
    bad("integer weights", lambda: jn.weight_norm(X.astype(int), X), TypeError, "v must", "v.as"),
    bad("lengths of rows", lambda: jn.weight_norm(X, X[:, 0]), ValueError, "g must", "got (4,)"),
    bad(
        "gain of another size",
        lambda: jn.standardize_weight(X, X[:, 0]),
        ValueError,
        "gain must have shape (6,)",
        "got (4,)",
    ),
    bad("no state of spectral norm", lambda: jn.spectral_norm(X, DICT), TypeError, "state", "dict"),
    bad(
        "state of the transposed weights",
        lambda: jn.spectral_norm(X.T, SPECTRAL),
        ValueError,
        "state.u must have shape (4,)",
        "got (6,)",
    ),
    bad(
        "state of spectral norm in half precision",
        lambda: jn.spectral_norm(X, jax.tree.map(lambda a: a.astype(jnp.bfloat16), SPECTRAL)),
        TypeError,
        "state.u must be float32 or better",
        "bfloat16",
    ),
    bad("no steps", lambda: jn.spectral_norm(X, SPECTRAL, steps=0), ValueError, "steps", "got 0"),
    bad(
        "steps traced",
        lambda: jax.jit(lambda n: jn.spectral_norm(X, SPECTRAL, steps=n))(2),
        TypeError,
        "steps must be an integer",
        "static",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), CASES)
def test_says_what_is_wrong(call, error, words):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    for word in words:
        assert word in message
    assert ";" in message  # what to do follows what was given
    assert "\n" not in message


def test_raised_while_tracing():
    with pytest.raises(ValueError, match="axis must lie"):
        jax.eval_shape(lambda x: jn.layer_norm(x, axis=5), jax.ShapeDtypeStruct((4, 6), "float32"))
