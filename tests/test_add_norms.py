"""Norms of a residual sum: values, dtypes, masks, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adding import ADD_NORM_IDS, ADD_NORMS, compute, draw, expected
from contract import EPS, SHAPES, assert_near

import jaxnorm as jn

EACH = pytest.mark.parametrize("add", ADD_NORMS, ids=ADD_NORM_IDS)
LAYER, _, RMS = ADD_NORMS


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPES["1-feature"], jnp.float32),
        (SHAPES["1-position"], jnp.bfloat16),
        (SHAPES["1000-features"], jnp.float32),
        (SHAPES["1000-features"], jnp.bfloat16),
        ((40, 30, 120), jnp.bfloat16),  # more than one task
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
@EACH
def test_the_contract(add, implementation, shape, dtype):
    example, residual, d_residual_sum = args = draw(add, shape, dtype)
    residual_sum, dresidual, ttotal, results = compute(
        add, implementation, 1e-6, example, residual, d_residual_sum
    )
    for a in (residual_sum, dresidual, ttotal, *results[:2], results.ty):
        assert a.dtype == dtype
    exact = example.x.astype(np.float32) + residual.astype(np.float32)
    np.testing.assert_array_equal(residual_sum, exact.astype(dtype))
    np.testing.assert_array_equal(dresidual, results.dx)
    np.testing.assert_array_equal(ttotal, example.tx / 2)
    assert_right(add, implementation, args, results)


def assert_right(add, implementation, args, results):
    example, residual, d_residual_sum = args
    right, sizes = expected(add, example, residual, d_residual_sum, 1e-6)
    terms = example.x.size // example.scale.size
    assert_near(results, right, sizes, terms, formula=implementation == "xla")


@pytest.mark.parametrize("add", [LAYER, RMS], ids=["layer", "rms"])
def test_long_rows(add, implementation):
    example, residual, d_residual_sum = args = draw(add, SHAPES["long-rows"])
    results = compute(add, implementation, 1e-6, example, residual, d_residual_sum)[-1]
    assert_right(add, implementation, args, results)


def test_the_sum_is_normalized_before_it_is_rounded(implementation, rng):
    """Near 256 a bfloat16 holds even numbers only."""
    x = rng.standard_normal((8, 64), np.float32).astype(jnp.bfloat16)
    residual = jnp.full(x.shape, 256, jnp.bfloat16)
    y, residual_sum = jax.jit(functools.partial(LAYER, implementation=implementation))(x, residual)
    truth = LAYER.truth(np.asarray(x, np.float32), np.float32(256))
    bound = 0.51 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(truth).max()
    np.testing.assert_allclose(oracle.wide(y.astype(jnp.float32)), truth, rtol=0, atol=bound)
    np.testing.assert_array_equal(residual_sum, x + residual)
    assert np.abs(oracle.wide(jn.layer_norm(residual_sum).astype(jnp.float32)) - truth).max() > 0.1


@EACH
def test_it_is_the_norm_of_the_sum(add):
    """In float32 the sum is not rounded again."""
    example, residual, d_residual_sum = draw(add)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f):
        results, pullback = jax.vjp(f, example.x, residual, example.scale, example.bias)
        return results, pullback((example.dy, d_residual_sum))

    def of_sum(x, residual, *params):
        residual_sum = x + residual
        return add.norm(residual_sum, *params), residual_sum

    for ours, plain in zip(*(jax.tree.leaves(run(f)) for f in (add, of_sum)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=8 * EPS * np.abs(plain).max())


@pytest.mark.usefixtures("x64")
@EACH
def test_float64_is_the_norm_of_the_sum(add, rng):
    x, residual = rng.standard_normal((2, 4, 6, 8)) + 3
    y, residual_sum = add(x, residual)
    assert y.dtype == residual_sum.dtype == jnp.float64
    np.testing.assert_array_equal(residual_sum, x + residual)
    np.testing.assert_allclose(y, add.truth(x, residual), rtol=0, atol=1e-14)  # of float64


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.complex64], ids=lambda t: t.__name__)
@EACH
def test_other_dtypes(add, dtype, rng):
    x, residual = rng.standard_normal((2, 4, 6, 8)).astype(dtype)
    if dtype == jnp.complex64:
        x = x + 1j * residual[::-1]
    y, residual_sum = add(x, residual)
    assert y.dtype == residual_sum.dtype == dtype
    np.testing.assert_array_equal(residual_sum, x + residual)
    bound = 3 * float(jnp.finfo(dtype).eps) * np.abs(y).max()
    np.testing.assert_allclose(oracle.wide(y), add.truth(x, residual), rtol=0, atol=bound)


@EACH
def test_masks(add, rng):
    x, residual = rng.standard_normal((2, 4, 6, 8), np.float32)
    where = rng.random(x.shape) < 0.6
    where[0] = False
    bias = np.ones(add.norm.features(x.shape), np.float32)
    y, residual_sum = add(x, residual, None, bias, where=where)
    np.testing.assert_array_equal(residual_sum, x + residual)
    np.testing.assert_array_equal(y[0], np.ones_like(y[0]))
    assert oracle.units(y, add.truth(x, residual, None, bias, where=where)) <= 4


@pytest.mark.parametrize("offset", [1.0, -0.5])
@EACH
def test_a_scale_with_an_offset(add, offset, implementation, rng):
    """The sum of offset and scale is not rounded: in bfloat16 1 + 0.00390625 is 1."""
    x, residual, dy = rng.standard_normal((3, 4, 6, 8), np.float32)
    features = add.norm.features(x.shape)
    scale = np.full(features, 0.00390625, jnp.bfloat16)
    bias = rng.standard_normal(features, np.float32)
    offsets = {"scale_offset": offset}

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(implementation, offset, scale):
        f = functools.partial(add, implementation=implementation, **dict(offset))
        (y, residual_sum), pullback = jax.vjp(f, x, residual, scale, bias)
        return y, pullback((dy, jnp.zeros_like(residual_sum)))

    y, gradients = run(implementation, tuple(offsets.items()), scale)
    plain_y, plain_gradients = run("xla", (), scale.astype(np.float32) + np.float32(offset))
    assert gradients[2].dtype == jnp.bfloat16
    assert oracle.units(y, plain_y) <= 4
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        bound = 8 * float(jnp.finfo(ours.dtype).eps) * np.abs(plain).max()
        np.testing.assert_allclose(ours.astype(jnp.float32), plain, rtol=0, atol=bound)


X, PARAMS = jnp.ones((4, 6)), jn.init_params(6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda add: add(X, X[0]),
            ValueError,
            ["residual must have the shape of x, (4, 6)", "(6,)"],
        ),
        (
            lambda add: add(X, X.astype(jnp.bfloat16)),
            TypeError,
            ["residual must have the dtype of x, float32", "bfloat16"],
        ),
        (
            lambda add: add(X, X, scale_offset=1.0),
            ValueError,
            ["scale_offset must be added to a scale", "1.0"],
        ),
        (
            lambda add: add(X, X, jn.NormParams(bias=X[0]), scale_offset=1.0),
            ValueError,
            ["scale_offset must be added to a scale"],
        ),
        (
            lambda add: add(X, X, PARAMS, scale_offset=float("inf")),
            ValueError,
            ["scale_offset must be finite", "inf"],
        ),
        (
            lambda add: jax.jit(lambda a: add(X, X, PARAMS, scale_offset=a))(1.0),
            TypeError,
            ["scale_offset must be a number"],
        ),
        (
            lambda add: add(X, X, PARAMS, scale_offset=jnp.ones(8)),
            TypeError,
            ["scale_offset must be a number"],
        ),
        (lambda add: add(X, None), TypeError, ["residual must be an array like x", "None"]),
    ],
    ids=["shape", "dtype", "no-params", "no-scale", "infinite", "traced", "array", "no-residual"],
)
@pytest.mark.parametrize("add", [jn.add_layer_norm, jn.add_rms_norm])
def test_says_what_is_wrong(add, call, error, words):
    with pytest.raises(error) as raised:
        call(add)
    message = str(raised.value)
    for word in words:
        assert word in message
    assert ";" in message
    assert "\n" not in message
