"""Worked examples of tutorials, with correct arithmetic."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn


def batch_norm(x, params=None, epsilon=0.0):
    state = jn.init_batch_norm_state(x.shape[-1])
    return jn.batch_norm(x, state, params=params, epsilon=epsilon)[0]


def columns(*values):
    return np.repeat(np.array(values)[:, None], 2, axis=1)


def test_two_to_ten():
    x = jnp.array([2.0, 4.0, 6.0, 8.0, 10.0])
    mean, var, count = jn.moments(x, 0)
    assert (mean, var, count) == (6, 8, 5)
    expected = [-1.4142, -0.7071, 0, 0.7071, 1.4142]
    np.testing.assert_allclose(jn.layer_norm(x, epsilon=0.0), expected, atol=5e-5)
    np.testing.assert_allclose(batch_norm(x[:, None])[:, 0], expected, atol=5e-5)


def test_three_by_two():
    x = jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    np.testing.assert_allclose(jn.moments(x, 0).var, [0.02667, 0.02667], atol=5e-6)
    np.testing.assert_allclose(batch_norm(x), columns(-1.2247, 0, 1.2247), atol=5e-5)


def test_scale_two_bias_one():
    x = jnp.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    y = batch_norm(x, jn.NormParams(jnp.full(2, 2.0), jnp.full(2, 1.0)))
    np.testing.assert_allclose(y, columns(-1.4495, 1, 3.4495), atol=5e-5)


def test_multiples_of_one_to_a_hundred():
    x = jnp.arange(1.0, 101.0)[:, None] * jnp.arange(1.0, 6.0)[None]
    np.testing.assert_allclose(batch_norm(x)[0], np.full(5, -1.7148), atol=5e-5)


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e6])
def test_the_scale_of_the_input_does_not_matter(factor):
    x = jnp.array([[1.0, 5.0, 2.0, 8.0]])
    ours = jn.layer_norm(factor * x, epsilon=0.0)
    np.testing.assert_allclose(ours, jn.layer_norm(x, epsilon=0.0), rtol=1e-6)


def test_layer_norm_normalizes_activations_not_parameters():
    params = jn.NormParams(jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0]))
    y = jn.layer_norm(jnp.array([[1.0, 3.0]]), params, epsilon=0.0)
    np.testing.assert_allclose(y, [[-3.0 + 5.0, 4.0 + 6.0]], rtol=1e-6)
