"""Batch renormalization: the paper's numbers, and no gradient through r and d."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from renorming import LIMITS, MEAN, VAR, assert_equal, problem, renormed, some, state_of, truth
from transformations import (
    SHAPE,
    assert_same,
    forward_over_reverse,
    jvp,
    reverse_over_reverse,
    vmap_of_grad,
)

import jaxnorm as jn

FLOAT64: Any = np.float64


@jax.jit
def value_and_gradients(x, scale, bias, dy, where, state, limits):
    y, vjp = jax.vjp(
        lambda x, *p: renormed(x, *p, where=where, state=state, limits=limits), x, scale, bias
    )
    return y, *vjp(dy)


@pytest.mark.parametrize(("shift", "masked"), [(0, True), (1e4, False)])
def test_values_and_gradients_in_float32(shift, masked, rng):
    x, scale, bias, dy = problem(rng, shape=(8, 25, 4))
    x, state, where = x + np.float32(shift), state_of(shift=shift), some(rng, x.shape)
    where = where if masked else None
    results = value_and_gradients(x, scale, bias, dy, where, state, LIMITS)
    right = truth(x, scale, bias, dy, where, state)
    # Rounding of mean, rstd, r, d and the formula; sums of 200 terms add sqrt(200) more at most.
    for result, expected, units in zip(results, right, (4, 4, 16, 16), strict=True):
        assert oracle.units(result, expected) < units


@pytest.mark.usefixtures("x64", "unoptimized")
def test_values_and_gradients_in_float64(rng):
    x, scale, bias, dy = problem(rng, np.float64)
    results = value_and_gradients(x, scale, bias, dy, None, state_of(jnp.float64), LIMITS)
    for result, expected in zip(results, truth(x, scale, bias, dy), strict=True):
        assert oracle.units(result, expected, FLOAT64) < 16  # both round


def test_the_data_meet_every_clip(rng):
    r, d = oracle.corrections(problem(rng)[0], (0, 1), (MEAN, VAR), LIMITS, 1e-5)
    for correction, limits in ((r, (2 / 3, 1.5)), (d, (-0.5, 0.5))):
        assert {*limits} <= {*correction.flat}
        assert not {*correction.flat} <= {*limits}


def plain(x, scale, bias, where, limits, epsilon):
    """The textbook's formula, for JAX to differentiate in float64."""
    n = jnp.sum(where, (0, 1), keepdims=True).astype(x.dtype)
    mean = jnp.sum(x, (0, 1), where=where, keepdims=True) / n
    var = jnp.sum((x - mean) ** 2, (0, 1), where=where, keepdims=True) / n
    along = lambda a: jnp.asarray(a).reshape(1, 1, -1)
    std, own = jnp.sqrt(along(VAR) + epsilon), jnp.sqrt(var + epsilon)
    r = lax.stop_gradient(jnp.clip(own / std, 1 / limits[0], limits[0]))
    d = lax.stop_gradient(jnp.clip((mean - along(MEAN)) / std, -limits[1], limits[1]))
    y = (x - mean) / own * r + d
    y = y if scale is None else y * along(scale)
    return y if bias is None else y + along(bias)


@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize(
    "transformation",
    [jvp, vmap_of_grad, forward_over_reverse, reverse_over_reverse],
    ids=lambda t: t.__name__,
)
def test_no_derivative_goes_through_the_corrections(transformation, rng):
    args = tuple(map(jnp.asarray, problem(rng, np.float64)[:3]))
    where, state = jnp.asarray(rng.random(SHAPE) < 0.7).at[0].set(True), state_of(jnp.float64)

    def ours(*args, limits, epsilon):
        return renormed(*args, where=where, state=state, limits=limits, epsilon=epsilon)

    def run(f):
        function = lambda args, limits: transformation(
            functools.partial(f, limits=limits, epsilon=0.01), args
        )
        return jax.jit(function)(args, LIMITS)

    assert_same(run(ours), run(functools.partial(plain, where=where)))


def test_neither_the_state_nor_the_limits_have_a_gradient_by_y(rng):
    x = problem(rng)[0]
    f = lambda mean, var, limits: jnp.sum(
        jnp.sin(renormed(x, state=jn.BatchNormState(mean, var, jnp.int32(0)), limits=limits))
    )
    gradients = jax.grad(f, (0, 1, 2))(*state_of()[:2], tuple(map(jnp.float32, LIMITS)))
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


@pytest.mark.usefixtures("x64", "unoptimized")
def test_derivatives_of_the_new_state_are_those_of_batch_norm(rng):
    x, _, _, dx = problem(rng, np.float64)

    def moved(x, renorm):
        y, state = jn.batch_norm(x, state_of(jnp.float64), renorm=renorm)
        return state.mean, state.var, jnp.sum(jnp.sin(y))

    of = lambda renorm: jax.jit(lambda x, dx: jax.jvp(lambda x: moved(x, renorm), (x,), (dx,)))
    ours, right = of(jn.Renorm(*LIMITS))(x, dx), of(None)(x, dx)
    assert_same([part[:2] for part in ours], [part[:2] for part in right])
    assert abs(ours[1][2] - right[1][2]) > 0.1  # of y they are others


def test_without_limits_it_is_evaluation(rng):
    x, scale, bias, _ = problem(rng)
    y = renormed(x, scale, bias, limits=(jnp.inf, jnp.inf))
    right = jn.batch_norm(x, state_of(), params=jn.NormParams(scale, bias), train=False)[0]
    np.testing.assert_allclose(y, right, atol=8e-6)  # h r + d rounds numbers up to 20


def both(x, scale, bias, dy, where=None, renorm=None, implementation=None):
    """y and the new state, and the gradients of x and the parameters."""

    def norm(x, params):
        return jn.batch_norm(
            x, state_of(), params=params, where=where, renorm=renorm, implementation=implementation
        )

    y, vjp, state = jax.vjp(norm, x, jn.NormParams(scale, bias), has_aux=True)
    return (y, state), vjp(dy)


@pytest.mark.parametrize("numbers", [(1, 0), (1.0, 0.0), (np.float32(1), -0.0)])
def test_the_numbers_one_and_zero_are_batch_norm_to_the_bit(numbers, rng):
    args = problem(rng)
    assert_equal(both(*args, renorm=jn.Renorm(*numbers)), both(*args, renorm=None))
    renorms = (jn.Renorm(*numbers), None)
    programs = [str(jax.make_jaxpr(functools.partial(both, renorm=r))(*args)) for r in renorms]
    assert programs[0] == programs[1]  # the same primitives, so the kernel is used if there is one


@pytest.mark.parametrize(
    ("dtype", "affine", "masked"),
    [(jnp.float32, True, False), (jnp.bfloat16, False, True)],
    ids=["float32", "bfloat16"],
)
def test_one_and_zero_traced_are_batch_norm_by_xla_to_the_bit(dtype, affine, masked, rng):
    x, scale, bias, dy = problem(rng, shape=(16, 25, 4))
    x, dy, where = jnp.asarray(x, dtype), jnp.asarray(dy, dtype), some(rng, x.shape)
    args = x, *((scale, bias) if affine else (None, None)), dy, where if masked else None
    one, zero = jnp.float32(1), jnp.float32(0)
    ours = jax.jit(both)(*args, jn.Renorm(one, zero))
    right = jax.jit(functools.partial(both, implementation="xla", renorm=None))(*args)
    assert_equal(ours, right)


def test_where_nothing_counts_there_is_the_bias_and_the_state_stays(rng):
    x, scale, bias, _ = problem(rng)
    params, renorm = jn.NormParams(scale, bias), jn.Renorm(*LIMITS)
    y, state = jn.batch_norm(
        x, state_of(), params=params, where=np.zeros((8, 1, 1), bool), renorm=renorm
    )
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    assert_equal(state, state_of())


def test_a_variance_of_zero_without_epsilon_gives_finite_numbers():
    x = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 3.0, 3.0]])
    zero = jn.BatchNormState(jnp.array([1.0, 0.0, 2.0, 0.0]), jnp.zeros(4), jnp.int32(0))
    y = renormed(x, state=zero, epsilon=0.0)
    # r is at its limit where the batch has a variance, and so is d where the means differ.
    np.testing.assert_array_equal(y, [[0, 0.5, -1.5, -1.0], [0, 0.5, 1.5, 2.0]])


@pytest.mark.parametrize("axes", [1, (-1, 1)], ids=str)
def test_any_feature_axes(axes, rng):
    x = rng.standard_normal((6, 2, 5, 2)).astype(np.float32)
    shape = tuple(x.shape[axis] for axis in sorted(np.atleast_1d(axes) % 4))
    running = MEAN[: np.prod(shape)].reshape(shape), VAR[: np.prod(shape)].reshape(shape)
    mean, var = (jnp.asarray(a, jnp.float32) for a in running)
    state = jn.BatchNormState(mean, var, jnp.int32(0))
    y = renormed(x, state=state, feature_axis=axes)
    right = oracle.batch_renorm(x, running, LIMITS, feature_axis=axes)
    assert oracle.units(y, right) < 4


def test_complex_input(rng):
    parts = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    x, mean = parts[0] + 1j * parts[1], np.array([0.2, -1j, 3 + 4j, 0.1 - 0.2j])
    state = jn.BatchNormState(jnp.asarray(mean, jnp.complex64), state_of().var, jnp.int32(0))
    y = renormed(x, state=state)
    assert oracle.units(y, oracle.batch_renorm(x, (mean, VAR), LIMITS)) < 4


@pytest.mark.usefixtures("x64")
def test_a_state_in_float64_may_have_parts_of_two_precisions(rng):
    x = problem(rng)[0]
    for kinds in ((jnp.float64, jnp.float32), (jnp.float32, jnp.float64)):
        mean, var = (jnp.asarray(a, kind) for a, kind in zip((MEAN, VAR), kinds, strict=True))
        y = renormed(x, state=jn.BatchNormState(mean, var, jnp.int32(0)))
        assert oracle.units(y, oracle.batch_renorm(x, (MEAN, VAR), LIMITS)) < 4


def test_bfloat16_is_rounded_once_and_alone_is_kept(rng):
    x, scale, bias, dy = problem(rng, shape=(8, 25, 4))
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    y, backward = jax.vjp(renormed, x, scale, bias)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(x.shape, x.dtype)]
    assert y.dtype == jnp.bfloat16
    right = truth(x, scale, bias, dy)
    # JAX adds up the gradients of each use of x in bfloat16.
    for result, expected, casts in zip((y, backward(dy)[0]), right[:2], (1, 3), strict=True):
        rounding = 0.51 * casts * float(jnp.finfo(jnp.bfloat16).eps)
        error = np.abs(oracle.wide(result) - expected).max()
        assert error <= rounding * np.abs(expected).max()
