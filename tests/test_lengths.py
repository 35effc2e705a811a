"""The 2-norm, of any magnitude, and its derivative at zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxnorm.core.lengths import two_norm

AXES = (0, 2)


def draw(rng, magnitude=1.0, dtype=np.float32):
    return np.asarray(magnitude * rng.standard_normal((40, 3, 20)), dtype)


def value_and_gradient(x, where=None):
    """Of the norms, and of their sum."""
    f = lambda x: two_norm(x, AXES, where)

    @jax.jit
    def run(x):
        y, backward = jax.vjp(f, x)
        return y, backward(jnp.ones_like(y))[0]

    return run(jnp.asarray(x))


@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30, 1e37])
def test_value_and_gradient_of_any_magnitude(magnitude, rng):
    x = draw(rng, magnitude)
    y, dx = value_and_gradient(x)
    right = oracle.two_norm(x, AXES)
    assert y.shape == right.shape
    # The root halves the error of a sum of 800 squares.
    assert oracle.units(y / magnitude, right / magnitude) < 2
    assert oracle.units(dx, oracle.wide(x) / right) < 2


def test_infinity_nan_and_numbers_too_small_for_float32():
    x = jnp.array([[jnp.inf, 1], [jnp.nan, 1], [1e-45, 0], [3e38, 3e37]])
    assert np.array_equal(np.isfinite(two_norm(x, 1)[:, 0]), [False, False, True, True])
    assert np.isnan(two_norm(x, 1)[1, 0])


@pytest.mark.parametrize("shape", [(4, 3), (0, 3)])
def test_every_derivative_at_zero_is_zero(shape):
    f = lambda x: jnp.sum(two_norm(x, 0))
    nested = f, jax.jacfwd(f), jax.jacrev(f), jax.jacfwd(jax.jacrev(f))
    run = jax.jit(lambda x: [derivative(x) for derivative in nested])
    assert not any(derivative.any() for derivative in run(jnp.zeros(shape)))


def test_where(rng):
    x, where = draw(rng), rng.random((3, 1)) < 0.5
    x[:, where[:, 0], :2] = np.nan
    where = np.broadcast_to(where, x.shape).copy()
    where[..., :2] = False
    y, dx = value_and_gradient(x, jnp.asarray(where))
    right = oracle.two_norm(x, AXES, where)
    assert (right == 0).any()
    np.testing.assert_allclose(y, right, rtol=1e-6)
    expected = np.where(where, np.where(where, x, 0) / np.where(right > 0, right, 1), 0)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_in_float32(dtype, rng):
    x = jnp.asarray(draw(rng), dtype)
    y, dx = value_and_gradient(x)
    assert (y.dtype, dx.dtype) == (jnp.float32, dtype)
    assert oracle.units(y, oracle.two_norm(x.astype(jnp.float32), AXES)) < 2


def test_complex_numbers_of_any_magnitude(rng):
    x = draw(rng) + 1j * draw(rng)
    for magnitude in (1, 1e36, 1e-30):
        z = (magnitude * x).astype(np.complex64)
        y, dz = value_and_gradient(z)
        right = oracle.two_norm(z, AXES)
        assert oracle.units(y / magnitude, right / magnitude) < 2
        assert oracle.units(dz, (oracle.wide(z) / right).conj()) < 2  # JAX's gradient is conjugate


@pytest.mark.usefixtures("x64", "unoptimized")
def test_nested_derivatives_agree_with_those_of_jax(rng):
    x = jnp.asarray(rng.standard_normal((2, 4)))
    ours = lambda x: jnp.sum(jnp.sin(two_norm(x, 1)))
    plain = lambda x: jnp.sum(jnp.sin(jnp.sqrt(jnp.sum(x**2, 1, keepdims=True))))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, x):
        third = jax.grad(jax.grad(jax.grad(lambda t: f(x + t * jnp.cos(x)))))
        batch = jnp.stack([x, -x, 2 * x])
        over = jax.jacfwd(jax.jacrev(f))(x), jax.jacrev(jax.jacfwd(f))(x), jax.hessian(f)(x)
        return *over, jax.vmap(jax.grad(f))(batch), third(0.0)

    for a, b in zip(derivatives(ours, x), derivatives(plain, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_second_derivatives_of_tiny_vectors(rng):
    x = rng.standard_normal(5).astype(np.float32)
    hessian = jax.jit(jax.hessian(lambda x: two_norm(x, 0)[0]))
    np.testing.assert_allclose(hessian(x * 1e-30) * 1e-30, hessian(x), atol=1e-6)


def test_backward_keeps_the_input_in_its_own_dtype_and_nothing_else_of_its_size():
    x = jnp.ones((8, 64), jnp.bfloat16)
    _, backward = jax.vjp(lambda x: two_norm(x, 1), x)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]
