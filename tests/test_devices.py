"""Batch norm across devices equals batch norm on one, for every map, mask, mesh and grouping."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import AxisType
from maps import (
    ALL,
    BOTH,
    DATA,
    EPSILON,
    EVEN,
    SAME,
    SHAPE,
    TOL,
    either_check,
    even_and_uneven,
    every_map,
    initial,
    mapped,
    masked_or_not,
    normalized,
    shard_map,
)
from norms import NORMS
from transformations import assert_same, forward_over_reverse, reverse_over_reverse

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx


def with_gradients(norm):
    """One program for the gradients of x and params, of a loss of all devices; y; the state."""

    def loss(x, params, where, weights):
        y, state = norm((x, where), params)
        return jnp.sum(jnp.sin(y) * weights), (y, state)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


@functools.cache
def training(how, groups=None):
    return with_gradients(mapped(how, functools.partial(normalized, groups=groups)))


def problem(rng, where=None, shape=SHAPE) -> tuple[Any, ...]:
    """x, scale and bias, which of x count, and the weights in the loss; of order one."""
    x, weights = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    scale, bias = rng.standard_normal((2, shape[-1])).astype(np.float32)
    return x + 1, jn.NormParams(scale, bias), where, weights


def some(rng, shape=SHAPE):
    """A mask under which every device counts another number, and the fourth none."""
    return rng.random(shape) < np.array([0.9, 0.2, 0.5, 0, 0.3, 0.8, 0.1, 1]).reshape(8, 1, 1)


def on_one_device(x, params, where, weights):
    """y, the gradients of x, scale and bias, and the new running mean and variance."""
    x, axes, old = oracle.wide(x), (0, 1), initial(x.shape[-1])
    y = oracle.batch_norm(x, *params, epsilon=EPSILON, where=where)
    g = np.cos(y) * weights
    dx = oracle.gradient(x, g * oracle.wide(params.scale), axes, EPSILON, where)
    h = oracle.standardized(x, axes, EPSILON, where)[0]
    mean, var, _ = (a[0, 0] for a in oracle.statistics(x, axes, where))
    running = (mean + oracle.wide(old.mean)) / 2, (var + oracle.wide(old.var)) / 2
    return y, dx, (g * h).sum(axes), g.sum(axes), *running


def assert_close(result, truth):
    np.testing.assert_allclose(result, truth, rtol=0, atol=TOL * np.abs(truth).max())


def assert_as_on_one_device(results, x, params, where, weights, groups=ALL):
    """All that `with_gradients` gives, for groups that are a device each; some must count."""
    (dx, gradients), (y, state) = jax.device_get(results)
    where = np.broadcast_to(True if where is None else where, x.shape)
    total_scale = total_bias = 0
    for group in map(list, groups):
        truth = on_one_device(x[group], params, where[group], weights[group])
        assert_close(y[group], truth[0])
        assert_close(dx[group], truth[1])
        total_scale, total_bias = total_scale + truth[2], total_bias + truth[3]
        for stat, expected in zip(state, (*truth[4:], 4), strict=True):
            np.testing.assert_array_equal(stat[group], stat[group[:1] * len(group)])
            assert_close(stat[group[0]], expected)
    assert_close(gradients.scale, total_scale)
    assert_close(gradients.bias, total_bias)


@masked_or_not
@every_map
def test_values_gradients_and_state_are_those_of_one_device(how, masked, rng):
    args = problem(rng, some(rng) if masked else None)
    assert_as_on_one_device(training(how)(*args), *args)


@every_map
def test_where_nothing_counts_there_is_the_bias_and_no_gradient(how, rng):
    args = problem(rng, np.zeros(SHAPE, bool))
    (dx, gradients), (y, state) = training(how)(*args)
    np.testing.assert_array_equal(y, np.broadcast_to(args[1].bias, SHAPE))
    assert not dx.any()
    assert not gradients.scale.any()
    for new, old in zip(state, initial(SHAPE[-1]), strict=True):
        np.testing.assert_array_equal(new, np.broadcast_to(old, (8, *old.shape)))


@pytest.mark.parametrize("apart", [True, False])
@every_map
def test_means_of_the_devices_1e4_apart_or_all_of_them_1e4(how, apart, rng):
    x, *others = problem(rng, some(rng))
    x += 1e4 * np.reshape(np.arange(8) if apart else np.ones(8), (8, 1, 1)).astype(np.float32)
    assert_as_on_one_device(training(how)(x, *others), x, *others)


@pytest.mark.usefixtures("small_tables")
@masked_or_not
@every_map
def test_more_features_than_are_gathered(how, masked, rng):
    shape = (8, 2, 1200 // (4 * 3) + 1)  # three statistics in float32
    mask = rng.random(shape) < 0.7
    mask[3], mask[0] = False, True
    args = problem(rng, mask if masked else None, shape)
    assert_as_on_one_device(training(how)(*args), *args)


@masked_or_not
@even_and_uneven
@every_map
def test_groups_are_a_device_each(how, groups, masked, rng):
    args = problem(rng, some(rng) if masked else None)
    assert_as_on_one_device(training(how, groups)(*args), *args, groups=groups)


@even_and_uneven
def test_groups_along_two_names_count_the_last_name_fastest(groups, rng):
    x, params, where, _ = problem(rng, some(rng))
    norm = functools.partial(normalized, axis_name=("i", "j"), groups=groups)
    for name in ("j", "i"):
        norm = jax.vmap(norm, axis_name=name, in_axes=(0, None))
    shards = jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), (x, where))
    y = np.asarray(jax.jit(norm)(shards, params)[0]).reshape(SHAPE)
    for group in map(list, groups):
        assert_close(y[group], oracle.batch_norm(x[group], *params, where=where[group]))


@every_map
def test_gradients_taken_on_each_device_are_those_of_the_sum_of_all_losses(how, rng):
    x, params, where, weights = args = problem(rng, some(rng))

    def gradients(shards, params):
        x, where, weights = shards
        loss = lambda x, params: jnp.sum(jnp.sin(normalized((x, where), params)[0]) * weights)
        return jax.grad(loss, (0, 1))(x, params)

    dx, (scale, bias) = jax.jit(mapped(how, gradients))((x, where, weights), params)
    truth = on_one_device(*args)
    assert_close(dx, truth[1])
    # Only check_vma knows that there is one params for all, and makes its gradient the sum.
    total = (lambda a: a[0]) if how == "checked" else (lambda a: a.sum(0))
    assert_close(total(scale), truth[2])
    assert_close(total(bias), truth[3])


@every_map
def test_a_map_may_be_traced_before_it_is_differentiated(how, rng):
    # A shape of its own: no rule of the derivative has been traced for it and kept.
    args = problem(rng, shape=(8, 3, 2))
    traced = jax.jit(mapped(how, normalized))
    assert_as_on_one_device(with_gradients(traced)(*args), *args)


@masked_or_not
@pytest.mark.parametrize(
    ("axis_name", "rows", "features"),
    [("data", "data", "model"), (BOTH, BOTH, None), (BOTH, "data", None)],
    ids=["features over the other", "rows over both", "rows over one of both"],
)
@either_check
def test_a_mesh_of_two_axes(how, axis_name, rows, features, masked, rng):
    x, params = jax.P(rows, None, features), jax.P(features)
    # No axis for the devices that share statistics: their states are one, and known to be.
    state: Any = (params, params, SAME)
    out_specs = (x, jn.BatchNormState(*state))

    def norm(shards, params):
        y, state = normalized(shards, params, axis_name)
        if masked and features:  # what counted of other features, only the user can ask
            state = state._replace(count=jax.lax.pmax(state.count, features))
        return y, state

    norm = shard_map(how, norm, ((x, jax.P(rows)), params), out_specs, data=4, model=2)
    args = problem(rng, some(rng)[..., :1] if masked else None)
    gradients, (y, state) = with_gradients(norm)(*args)
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (8, *a.shape)), state)
    assert_as_on_one_device((gradients, (y, state)), *args)


@pytest.mark.thorough
@pytest.mark.parametrize("groups", [ALL, EVEN], ids=["all", "even"])
@pytest.mark.usefixtures("x64")
def test_second_derivatives_agree_with_the_plain_formula(groups, rng):
    shapes, where = (SHAPE, SHAPE[-1:], SHAPE[-1:]), jnp.asarray(some(rng))
    args = tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    batch, rows = NORMS[0], np.array(groups)
    options = {"axis_name": "data", "axis_index_groups": groups if groups != ALL else None}

    def plain(x, scale, bias):
        y = jax.vmap(lambda x, where: batch.plain(x, scale, bias, where))(x[rows], where[rows])
        return x.at[rows].set(y)

    def sharded(how):
        f = lambda shards, params: batch(shards[0], params[0], params[1], shards[1], **options)
        return lambda x, *params: mapped(how, f)((x, where), params)

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, *args):
        return forward_over_reverse(f, args), reverse_over_reverse(f, args)

    truth = run(plain, *args)
    for how in ("checked", "unchecked"):
        assert_same(run(sharded(how), *args), truth)


@either_check
def test_a_half_precision_result_is_rounded_once(how, rng):
    x, params, where, _ = problem(rng, some(rng))
    x = jnp.asarray(x, jnp.bfloat16)
    y, _ = jax.jit(mapped(how, normalized))((x, where), params)
    assert y.dtype == jnp.bfloat16
    truth = oracle.batch_norm(x, *params, where=where)
    rounding = float(jnp.finfo(jnp.bfloat16).eps) / 2
    np.testing.assert_allclose(oracle.wide(y), truth, rtol=rounding, atol=TOL * np.abs(truth).max())


@either_check
def test_complex_input(how, rng):
    real, params, where, imaginary = problem(rng, some(rng))
    x = (real + 1j * imaginary).astype(np.complex64)
    y, state = jax.jit(mapped(how, normalized))((x, where), params)
    assert_close(y, oracle.batch_norm(x, *params, where=where))
    mean, var, _ = oracle.statistics(oracle.wide(x), (0, 1), where)
    assert_close(state.mean, np.broadcast_to((mean[0] - 1) / 2, (8, 6)))
    assert_close(state.var, np.broadcast_to((var[0] + 3) / 2, (8, 6)))


def test_modules_agree_with_the_function_on_one_device(rng):
    x = problem(rng)[0].reshape(40, 6)
    options = {"axis_name": "data", "momentum": 0.5}
    y, state = jn.batch_norm(x, jn.init_batch_norm_state(6), momentum=0.5)

    linen = jaxnorm.linen.BatchNorm(use_running_average=False, **options)
    variables = linen.init(jax.random.key(0), x)  # where nothing binds the name
    apply = functools.partial(linen.apply, mutable=["batch_stats"])
    over_devices = shard_map("checked", apply, (SAME, DATA), (DATA, SAME), data=8)
    linen_y, updates = jax.jit(over_devices)(variables, x)
    assert_close(linen_y, y)
    assert_close(updates["batch_stats"]["mean"], state.mean)
    assert_close(updates["batch_stats"]["var"], state.var)

    norm = jaxnorm.nnx.BatchNorm(6, **options, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    call = nnx.shard_map(lambda norm, x: norm(x), mesh=mesh, in_specs=(SAME, DATA), out_specs=DATA)
    assert_close(nnx.jit(call)(norm, x), y)
    assert_close(norm.mean[...], state.mean)
    assert_close(norm.var[...], state.var)


@every_map
def test_modules_agree_with_the_function_under_every_map(how, rng):
    x = problem(rng)[0]
    y, state = jn.batch_norm(x.reshape(40, 6), jn.init_batch_norm_state(6), momentum=0.5)
    options = {"axis_name": "data", "momentum": 0.5}
    linen = jaxnorm.linen.BatchNorm(use_running_average=False, **options)
    variables = linen.init(jax.random.key(0), x[0])
    graph, parts = nnx.split(jaxnorm.nnx.BatchNorm(6, **options, rngs=nnx.Rngs(0)))

    def call(shard, both):
        linen_y, updates = linen.apply(both[0], shard, mutable=["batch_stats"])
        norm = nnx.merge(graph, both[1], copy=True)
        stats: Any = updates["batch_stats"]
        return (linen_y, stats["mean"], stats["var"]), (norm(shard), norm.mean[...], norm.var[...])

    for result in jax.jit(mapped(how, call))(x, (variables, parts)):
        assert_close(result[0], np.reshape(y, SHAPE))
        assert_close(result[1], np.broadcast_to(state.mean, (8, 6)))
        assert_close(result[2], np.broadcast_to(state.var, (8, 6)))
