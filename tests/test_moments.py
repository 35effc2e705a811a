"""Moments: measured, merged, and added to a running state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnorm as jn


def moments_of(parts):
    return functools.reduce(jn.merge_moments, [jn.moments(part, 0) for part in parts])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from([0.0, 1e2, 1e4]))
@settings(max_examples=20)
def test_merging_parts_is_measuring_the_whole(sizes, apart):
    rng = np.random.default_rng(sum(sizes))
    parts = [
        np.asarray(apart * index + rng.standard_normal((size, 3)), np.float32)
        for index, size in enumerate(sizes)
    ]
    whole = np.concatenate(parts)
    mean, var, count = moments_of(parts)
    right = oracle.statistics(oracle.wide(whole), 0)
    # Each merge rounds the mean once; the variance has the square of the distances in it.
    tol = 4 * len(sizes) * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(mean, right[0][0], rtol=tol, atol=tol)
    np.testing.assert_allclose(var, right[1][0], rtol=10 * tol, atol=10 * tol)
    np.testing.assert_array_equal(count, np.full(3, len(whole)))


def test_nothing_is_neutral(rng):
    x = jnp.asarray(rng.standard_normal((5, 2)), jnp.float32)
    some, nothing = jn.moments(x, 0), jn.moments(x[:0], 0)
    for merged in (jn.merge_moments(some, nothing), jn.merge_moments(nothing, some)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, merged, some))
    both = jn.merge_moments(nothing, nothing)
    assert not any(part.any() for part in both)


def test_counts_past_two_to_the_24_are_exact():
    n = 2**25 + 4  # a float32, but no sum of ones in float32 gets past 2**24
    assert jn.moments(jnp.zeros(n), 0, where=jnp.ones(n, bool)).count == n


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (1, -1), (0, 1, 2)])
def test_axes(axis, rng):
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    mean, var, count = jn.moments(x, axis)
    np.testing.assert_allclose(mean, x.mean(axis), atol=1e-6)
    np.testing.assert_allclose(var, x.var(axis), atol=1e-6)
    assert mean.shape == var.shape == count.shape


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_dtypes(dtype):
    mean, var, count = jn.moments(jnp.ones((4, 2), dtype), 0)
    assert mean.dtype == jnp.promote_types(dtype, dtype) if dtype == jnp.complex64 else jnp.float32
    assert var.dtype == count.dtype == jnp.float32


@pytest.mark.usefixtures("x64", "unoptimized")
def test_derivatives_of_the_variance(rng):
    x = jnp.asarray(rng.standard_normal((6, 3)))
    where = jnp.asarray(rng.random((6, 1)) < 0.7).at[0].set(True)
    plain = lambda x: jnp.var(x, 0, where=where) + jnp.mean(x, 0, where=where) ** 3

    def ours(x):
        mean, var, _ = jn.moments(x, 0, where=where)
        return var + mean**3

    for transform in (jax.jacfwd, jax.jacrev, lambda f: jax.jacfwd(jax.jacrev(f))):
        a, b = (jax.jit(transform(f))(x) for f in (ours, plain))
        np.testing.assert_allclose(a, b, atol=1e-13)


@pytest.mark.usefixtures("x64", "unoptimized")
def test_derivatives_of_merging(rng):
    parts = [jnp.asarray(rng.standard_normal((size, 3))) for size in (2, 5)]
    whole = lambda *parts: jn.moments(jnp.concatenate(parts), 0)[:2]
    merged = lambda *parts: moments_of(parts)[:2]
    ours, right = (jax.jit(jax.jacrev(f))(*parts) for f in (merged, whole))
    for a, b in zip(ours, right, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)


def test_merging_overflows_no_sooner_than_measuring():
    x = jnp.zeros((8, 1)).at[7].set(2.5e19)  # whose square is no float32
    assert jnp.isfinite(jn.moments(x, 0).var).all()
    merged = moments_of([x[:7], x[7:]])
    np.testing.assert_allclose(merged.var, jn.moments(x, 0).var, rtol=1e-6)


def test_microbatches_committed_once_are_the_whole_batch(rng):
    x = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)
    state = jn.init_batch_norm_state(3)
    in_parts = jn.update_batch_norm_state(state, moments_of(jnp.split(x, 4)))
    whole = jn.batch_norm(x, state)[1]
    for a, b in zip(in_parts, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
