"""Values against NumPy in float64: shapes, axes, dtypes, masks, empty arrays."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import NORMS, norm_id
from shapes import IMAGES, ROWS

import jaxnorm as jn


def tolerance(dtype) -> float:
    """Half a unit for the cast to the result; four float32 units for the arithmetic.

    The means and variances of complex numbers are of two parts.
    """
    parts = 2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
    return 0.51 * float(jnp.finfo(dtype).eps) + 4 * parts * float(jnp.finfo(jnp.float32).eps)


def assert_close(result, truth, dtype=None):
    """Within the tolerance of the dtype, relative to the largest element and at least to one."""
    dtype = dtype or result.dtype
    largest = max(1.0, np.abs(truth).max(initial=0))
    error = np.abs(oracle.wide(np.asarray(result.astype(_wide(result.dtype)))) - truth)
    assert error.max(initial=0) <= tolerance(dtype) * largest


def _wide(dtype):
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32


def sample(rng, shape, dtype):
    """Random numbers with mean 3 and std 2, exactly as the dtype holds them."""
    x = 3 + 2 * rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rng.standard_normal(shape)
    return jnp.asarray(x, dtype)


def norms_of(shape):
    """The norms of rows, and of images those of examples with positions too."""
    names = {"batch", "layer", "rms"} | ({"group", "instance"} if len(shape) > 2 else set())
    return [norm.with_groups(shape) for norm in NORMS if norm.name in names]


# float32 for every shape, and the other dtypes, which are cast first, for some.
NAMED = [(name, jnp.float32) for name in ROWS | IMAGES]
NAMED += [(name, jnp.bfloat16) for name in ("gpt2", "mlp", "resnet-stem", "digits")]
NAMED += [(name, dtype) for name in ("mlp", "digits") for dtype in (jnp.float16, jnp.complex64)]


@pytest.mark.parametrize(("name", "dtype"), NAMED, ids=lambda v: getattr(v, "__name__", v))
def test_named_shapes(name, dtype, rng):
    shape = (ROWS | IMAGES)[name]
    norms = norms_of(shape)
    x = sample(rng, shape, dtype)
    wide = np.asarray(x.astype(_wide(dtype)))
    draw = lambda norm: sample(rng, norm.features(shape), jnp.float32)
    params = [(draw(norm), draw(norm)) for norm in norms]

    @jax.jit
    def all_of_them(x, params):
        return [norm(x, *pair) for norm, pair in zip(norms, params, strict=True)]

    for norm, pair, y in zip(norms, params, all_of_them(x, params), strict=True):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_close(y, norm.truth(wide, *pair, **norm.options))


def masks(shape):
    """Boolean arrays that broadcast to the shape, of its rank."""
    sides = st.tuples(*(st.sampled_from([1, size]) for size in shape))
    return sides.flatmap(lambda sides: hnp.arrays(bool, sides))


@given(st.data())
@settings(max_examples=20)
def test_any_axes_and_masks(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
    axes = data.draw(
        st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True).map(tuple), "axes"
    )
    signed = tuple(axis - len(shape) * data.draw(st.booleans()) for axis in axes)
    where = data.draw(st.none() | masks(shape[data.draw(st.integers(0, len(shape))) :]), "where")
    x = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape)
    x = x.astype(np.float32)
    for ours, truth in ((jn.layer_norm, oracle.layer_norm), (jn.rms_norm, oracle.rms_norm)):
        y = ours(x, axis=signed, where=where)
        assert_close(y, truth(x, axis=axes, where=where))


@given(st.data())
@settings(max_examples=10)
def test_any_feature_axis_and_groups(data):
    groups = data.draw(st.integers(1, 3), "groups")
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=4))
    axis = data.draw(st.integers(1, len(shape) - 1), "feature_axis")
    shape = (*shape[:axis], groups * shape[axis], *shape[axis + 1 :])
    axis -= len(shape) * data.draw(st.booleans())
    where = data.draw(st.none() | masks(shape), "where")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal(shape).astype(np.float32)
    scale, bias = rng.standard_normal((2, shape[axis])).astype(np.float32)
    params, options = jn.NormParams(scale, bias), {"feature_axis": axis, "where": where}
    state = jn.init_batch_norm_state(shape[axis])
    assert_close(
        jn.group_norm(x, params, num_groups=groups, **options),
        oracle.group_norm(x, scale, bias, num_groups=groups, **options),
    )
    if len(shape) > 2:  # else there is nothing to measure over, which is an error
        expected = oracle.instance_norm(x, scale, bias, **options)
        assert_close(jn.instance_norm(x, params, **options), expected)
    assert_close(
        jn.batch_norm(x, state, params=params, **options)[0],
        oracle.batch_norm(x, scale, bias, **options),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_float64_stays_float64(norm, rng):
    x = rng.standard_normal((4, 6, 8)) + 3
    y = norm(x)
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, norm.truth(x, **norm.options), rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_where_nothing_counts_there_is_the_bias_and_no_gradient(norm, rng):
    x = sample(rng, (4, 6, 8), jnp.float32)
    scale, bias = (sample(rng, norm.features(x.shape), jnp.float32) for _ in range(2))
    nothing = jnp.zeros(x.shape, bool)
    f = lambda x, scale, bias: norm(x, scale, bias, where=nothing)

    @jax.jit
    def derivatives(x, scale, bias):
        y, backward = jax.vjp(f, x, scale, bias)
        cubes = lambda x: jnp.sum(f(x, scale, bias) ** 3)
        second = jax.grad(lambda x: jnp.sum(jax.grad(cubes)(x)))
        return y, backward(jnp.ones_like(y)), second(x)

    y, (dx, dscale, dbias), second = derivatives(x, scale, bias)
    expand = (1,) * (x.ndim - bias.ndim) + bias.shape
    np.testing.assert_array_equal(y, jnp.broadcast_to(bias.reshape(expand), x.shape))
    assert not dx.any()
    assert not dscale.any()
    assert dbias.all()
    assert not second.any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_what_is_masked_does_not_touch_the_rest(norm, garbage, rng):
    x = rng.standard_normal((4, 6, 8)).astype(np.float32)
    where = rng.random(x.shape) < 0.7
    where[:, :2], where[..., :2] = True, True
    dirty = np.where(where, x, np.float32(garbage))
    clean = np.where(where, x, np.float32(0))
    ours, expected = norm(dirty, where=where), norm(clean, where=where)
    np.testing.assert_array_equal(np.where(where, ours, 0), np.where(where, expected, 0))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 200, 4), (200, 3, 0)])
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_empty_input(norm, shape):
    x = jnp.zeros(shape)
    params = [jnp.ones(norm.features(shape)) for _ in range(2)]
    y, backward = jax.vjp(norm, x, *params)
    assert y.shape == shape
    for gradient in backward(y):
        assert not gradient.any()


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.subtract_mean], ids=norm_id)
def test_a_constant_becomes_zero_even_with_epsilon_zero(norm):
    x = jnp.full((4, 6, 8), 1.1)
    np.testing.assert_array_equal(norm(x, epsilon=0.0), jnp.zeros_like(x))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_nan_and_infinity_are_not_hidden(norm, bad):
    x = np.ones((4, 6, 8), np.float32)
    x[0, 0, 0] = bad
    assert np.isnan(norm(x)).any()


@pytest.mark.parametrize("norm", NORMS, ids=norm_id)
def test_tracing_once_serves_equal_shapes(norm, rng):
    traces = []
    f = jax.jit(lambda x: (traces.append(1), norm(x))[1])
    for _ in range(3):
        f(sample(rng, (4, 6, 8), jnp.float32))
    assert len(traces) == 1
