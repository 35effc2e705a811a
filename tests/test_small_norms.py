"""The small norms: values and derivatives against NumPy in float64, and every transformation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from more_norms import (
    ERF,
    FAMILY,
    FILTER,
    GLOBAL,
    GLOBAL_RATIO,
    LOCAL,
    LOCAL_EVEN,
    LOCAL_RATIO,
    ONE_EACH,
    RATIOS,
    TANH,
    UNBOUNDED,
    UNIT,
    of_parts,
)
from transformations import SHAPE, scalar

import jaxnorm as jn

name_of = lambda norm: norm.name
each = pytest.mark.parametrize("norm", FAMILY, ids=name_of)
one_each = pytest.mark.parametrize("norm", ONE_EACH, ids=name_of)
X = jnp.ones((4, 6))
COMPLEX = X.astype(jnp.complex64)
WORD: Any = "one"  # for the type checker, anything
HALF: Any = 2.5
DICT: Any = {}


@functools.partial(jax.jit, static_argnums=0)
def value_and_cotangents(function, args, dy):
    y, pullback = jax.vjp(function, *args)
    return y, pullback(dy)


def errors(norm, args, dy):
    """The error of y, and the largest of the gradients, in units."""
    y, gradients = value_and_cotangents(norm.function, args, dy)
    right = oracle.cotangents(norm.truth, args, dy)
    assert y.dtype == np.float32
    assert [g.shape for g in gradients] == [np.shape(a) for a in args]
    return oracle.units(y, norm.truth(*args)), max(map(oracle.units, gradients, right))


def cotangent(rng):
    return rng.standard_normal(SHAPE).astype(np.float32)


@each
def test_values_and_gradients(norm, rng):
    args = norm.arguments(rng, SHAPE)
    assert max(errors(norm, args, cotangent(rng))) <= 4  # some ten roundings


@pytest.mark.parametrize("std", [1e30, 1e-30])
@pytest.mark.parametrize("norm", RATIOS, ids=name_of)
def test_squares_that_float32_does_not_hold(norm, std, rng):
    args = norm.arguments(rng, SHAPE, std=std)
    assert max(errors(norm, args, cotangent(rng))) <= 4


# Squares of 3e19 overflow, and the result, about 1e-10, has the gradient 1e-29. The core that the
# filter response goes through takes numbers up to 1e19, as for the five norms.
@pytest.mark.parametrize(("norm", "std"), [(LOCAL, 3e19), (FILTER, 1e18)], ids=["local", "filter"])
def test_large_numbers(norm, std, rng):
    args = norm.arguments(rng, SHAPE, std=std)
    assert max(errors(norm, args, cotangent(rng))) <= 4


def test_neighbours_of_very_different_magnitudes_do_not_disturb_each_other():
    x = np.array([1e30, 1.0, 2.0, 1e-30, 2e-30], np.float32)
    options = {"size": 3, "alpha": 0.5, "beta": 0.4, "k": 0.0}
    y = jn.local_response_norm(x, **options)
    right = oracle.local_response_norm(x, **options)
    np.testing.assert_allclose(y, right, rtol=1e-6)  # some ten roundings


@pytest.mark.parametrize("norm", [TANH, ERF], ids=name_of)
def test_the_derivative_is_accurate_where_the_function_is_nearly_one(norm):
    x = np.linspace(3.0, 4.0, 16, dtype=np.float32)
    factor = 2.0 if norm is TANH else 1.0
    function = {
        TANH: lambda x: jn.dynamic_tanh(x, factor),
        ERF: lambda x: jn.dynamic_erf(x, factor, 0.0),
    }[norm]
    right = {
        TANH: lambda x: factor / np.cosh(factor * x) ** 2,
        ERF: lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2)),
    }[norm](x.astype(np.float64))
    dx = jax.vjp(function, x)[1](np.ones_like(x))[0]
    # The exponent, of up to 16, is rounded by half a unit, so the result is by 8. Had it been
    # 1 - tanh(8)**2, no digit would be right.
    np.testing.assert_allclose(dx, right, rtol=12 * float(np.finfo(np.float32).eps))


@one_each
def test_bfloat16_is_rounded_once(norm, rng):
    x, *learned = norm.arguments(rng, SHAPE)
    x = jnp.asarray(x, jnp.bfloat16)
    dy = jnp.asarray(cotangent(rng), jnp.bfloat16)
    y, (dx, *gradients) = value_and_cotangents(norm.function, (x, *learned), dy)
    exact = [np.asarray(x, np.float32), *learned]
    right = oracle.cotangents(norm.truth, exact, np.asarray(dy, np.float32))
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)
    half = 0.51 * 2**16  # of a unit of bfloat16, which are 16 bits less
    assert oracle.units(y.astype(jnp.float32), norm.truth(*exact)) <= half
    # Each use of x has a gradient that is rounded, and their sum is: x itself, and its statistics.
    assert oracle.units(dx.astype(jnp.float32), right[0]) <= 3 * half
    assert all(g.dtype == jnp.float32 for g in gradients)
    assert max(map(oracle.units, gradients, right[1:]), default=0) <= 4


@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize("norm", [UNIT[0], UNIT[2], *ONE_EACH], ids=name_of)
def test_jvp_and_grad_of_grad_under_vmap_and_jit(norm, rng):
    """Against central differences of the value, and of the gradient's length."""
    args = norm.arguments(rng, SHAPE, np.float64)
    tangents = tuple(np.cos(a) for a in args)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def run(args, t):
        args = jax.tree.map(lambda a, v: a + t * v, args, tangents)
        gradient = jax.grad(lambda *args: scalar(norm.function(*args)), range(len(args)))
        squares = lambda *args: sum(jnp.sum(g**2) for g in gradient(*args))
        grad_of_grad = jax.value_and_grad(squares, range(len(args)))
        return jax.jvp(norm.function, args, tangents), grad_of_grad(*args)

    step = 1e-5  # its square is the error of the difference
    (y, ty), (squares, gradient) = run(args, step * np.arange(-1.0, 2.0))
    np.testing.assert_allclose(ty[1], (y[2] - y[0]) / (2 * step), rtol=1e-7, atol=1e-8)
    along = sum(np.sum(g[1] * t) for g, t in zip(gradient, tangents, strict=True))
    np.testing.assert_allclose(along, (squares[2] - squares[0]) / (2 * step), rtol=1e-7)

    at_zero = run((0 * args[0], *args[1:]), np.zeros(3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(at_zero))


@pytest.mark.parametrize("norm", [*RATIOS, FILTER], ids=name_of)
def test_at_zero_there_is_no_nan(norm, rng):
    x, *learned = norm.arguments(rng, SHAPE)
    y, gradients = value_and_cotangents(norm.function, (0 * x, *learned), cotangent(rng))
    assert all(np.isfinite(leaf).all() for leaf in (y, *gradients))
    if norm in (*UNIT, LOCAL_RATIO):
        assert not y.any()
        assert not gradients[0].any()


@pytest.mark.parametrize("norm", [UNIT[1], GLOBAL_RATIO, UNBOUNDED, LOCAL_RATIO], ids=name_of)
def test_complex_input(norm, rng):
    parts = of_parts(norm)
    dy = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    for std in (1, 1e30, 1e-30) if norm in RATIOS else (1,):
        args = norm.arguments(rng, SHAPE, std=std)
        args = (args[0], norm.arguments(rng, SHAPE, std=std)[0], *args[1:])
        assert max(errors(parts, args, dy)) <= 8  # each part is the sum of two products


def test_an_element_that_is_zero_does_not_move_the_1_norm():
    gradient = jax.grad(lambda x: jn.unit_norm(x, ord=1)[1])(jnp.array([0.0, 2.0]))
    np.testing.assert_array_equal(gradient, [0, 0])


@pytest.mark.parametrize("ord", [1, 2, np.inf])
def test_unit_norm_where_the_norm_is_less_than_epsilon_divides_by_epsilon(ord):
    x = jnp.array([[1e-4, -2e-4]])
    y, pullback = jax.vjp(lambda x: jn.unit_norm(x, ord=ord, epsilon=0.5), x)
    np.testing.assert_allclose(y, 2 * x, rtol=1e-6)
    np.testing.assert_array_equal(pullback(jnp.ones_like(x))[0], [[2, 2]])


def test_unit_norm_where_nothing_counts_is_zero_and_so_is_its_gradient():
    x, nothing = jnp.ones((2, 3)), jnp.array([[True], [False]])
    y, pullback = jax.vjp(lambda x: jn.unit_norm(x, where=nothing), x)
    np.testing.assert_allclose(y, [[3**-0.5] * 3, [0] * 3], rtol=1e-6)
    assert not pullback(x)[0][1].any()


@each
def test_backward_keeps_x_in_its_own_dtype_and_nothing_else_of_its_size(norm, rng):
    x, *learned = norm.arguments(rng, (8, 3, 4))
    x = jnp.asarray(x, jnp.bfloat16)
    _, backward = jax.vjp(norm.function, x, *learned)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    masks = [leaf for leaf in kept if leaf.dtype == bool]  # `where` is an argument
    assert len(masks) <= (norm.name == "unit-masked")
    rest = [leaf for leaf in kept if leaf.dtype != bool]
    assert [(leaf.shape, leaf.dtype) for leaf in rest] == [(x.shape, x.dtype)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("norm", [*UNIT[:3], GLOBAL, UNBOUNDED, LOCAL, LOCAL_EVEN], ids=name_of)
def test_nan_and_infinity_are_not_hidden(norm, bad, rng):
    x, *learned = norm.arguments(rng, SHAPE)
    x[0, 0, 0] = bad
    assert np.isnan(norm.function(x, *learned)).any()


@pytest.mark.parametrize("feature_axis", [1, -2])
def test_features_may_be_another_axis(feature_axis, rng):
    x = rng.standard_normal((2, 4, 3)).astype(np.float32)
    scale, bias, other = rng.standard_normal((3, 4)).astype(np.float32)
    params, axis = jn.NormParams(scale, bias), {"feature_axis": feature_axis}
    local = {"size": 3, "alpha": 2.0}
    pairs = [
        (
            jn.global_response_norm(x, params, **axis),
            oracle.global_response_norm(x, scale, bias, **axis),
        ),
        (
            jn.filter_response_norm(x, params, other, **axis),
            oracle.filter_response_norm(x, scale, bias, other, **axis),
        ),
        (
            jn.dynamic_tanh(x, other, params, **axis),
            oracle.dynamic_tanh(x, other, scale, bias, **axis),
        ),
        (
            jn.dynamic_erf(x, other, 0.5, params, **axis),
            oracle.dynamic_erf(x, other, 0.5, scale, bias, **axis),
        ),
        (
            jn.local_response_norm(x, **local, **axis),
            oracle.local_response_norm(x, **local, **axis),
        ),
    ]
    for ours, right in pairs:
        assert oracle.units(ours, right) <= 4


def bad(name, call, error, *words):
    return pytest.param(call, error, words, id=name)


CASES = [
    bad("ord", lambda: jn.unit_norm(X, ord=3), ValueError, "ord must be 1, 2 or inf", "got 3"),
    bad("ord a word", lambda: jn.unit_norm(X, ord=WORD), ValueError, "ord must be 1, 2 or inf"),
    bad("axis", lambda: jn.unit_norm(X, axis=2), ValueError, "axis must lie in", "got 2"),
    bad(
        "epsilon",
        lambda: jn.unit_norm(X, epsilon=-1.0),
        ValueError,
        "epsilon must be at least 0",
    ),
    bad(
        "where",
        lambda: jn.unit_norm(X, where=jnp.ones((4, 5), bool)),
        ValueError,
        "where must broadcast",
    ),
    bad(
        "integers",
        lambda: jn.local_response_norm(jnp.ones((2, 3), int), size=1),
        TypeError,
        "x must be floating-point",
    ),
    bad(
        "no batch",
        lambda: jn.global_response_norm(jnp.ones(6)),
        ValueError,
        "feature_axis must leave out the first axis",
    ),
    bad(
        "scale",
        lambda: jn.global_response_norm(X, jn.init_params(5)),
        ValueError,
        "scale must have shape (6,)",
        "got (5,)",
    ),
    bad("params", lambda: jn.dynamic_tanh(X, 0.5, DICT), TypeError, "NormParams", "dict"),
    bad(
        "threshold",
        lambda: jn.filter_response_norm(X, None, jnp.ones(5)),
        ValueError,
        "threshold must have shape (6,)",
        "got (5,)",
    ),
    bad(
        "complex with a threshold",
        lambda: jn.filter_response_norm(COMPLEX, None, 0.0),
        TypeError,
        "x must be real for a threshold",
        "complex64",
    ),
    bad(
        "complex tanh",
        lambda: jn.dynamic_tanh(COMPLEX, 0.5),
        TypeError,
        "x must be real for dynamic_tanh",
    ),
    bad(
        "complex erf",
        lambda: jn.dynamic_erf(COMPLEX, 0.5, 0.0),
        TypeError,
        "x must be real for dynamic_erf",
    ),
    bad(
        "alpha",
        lambda: jn.dynamic_tanh(X, jnp.ones((4, 6))),
        ValueError,
        "alpha must have shape (6,)",
        "got (4, 6)",
    ),
    bad(
        "complex shift",
        lambda: jn.dynamic_erf(X, 0.5, 1j),
        TypeError,
        "shift must be real",
        "complex64",
    ),
    bad("size", lambda: jn.local_response_norm(X, size=0), ValueError, "size must be", "got 0"),
    bad(
        "size no integer",
        lambda: jn.local_response_norm(X, size=HALF),
        TypeError,
        "size must be an integer",
        "2.5",
    ),
    bad(
        "k",
        lambda: jn.local_response_norm(X, size=3, k=-1.0),
        ValueError,
        "k must be finite and at least 0",
        "got -1.0",
    ),
    bad(
        "beta",
        lambda: jn.local_response_norm(X, size=3, beta=float("nan")),
        ValueError,
        "beta must be finite",
        "got nan",
    ),
    bad(
        "neither alpha nor k",
        lambda: jn.local_response_norm(X, size=3, alpha=0.0, k=0.0),
        ValueError,
        "alpha or k must be positive",
    ),
    bad("a scalar", lambda: jn.dynamic_tanh(jnp.float32(1), 0.5), ValueError, "scalar"),
]


@pytest.mark.parametrize(("call", "error", "words"), CASES)
def test_says_what_is_wrong(call, error, words):
    with pytest.raises(error) as raised:
        call()
    for word in (*words, ";"):  # what to do follows what was given
        assert word in str(raised.value)
