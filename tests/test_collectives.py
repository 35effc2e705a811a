"""Collectives of compiled programs: their number and their sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from maps import (
    DATA,
    EVEN,
    SAME,
    SHAPE,
    either_check,
    mapped,
    masked_or_not,
    normalized,
    shard_map,
)
from norms import NORMS, norm_id

import jaxnorm as jn
from benchmarks.accelerators.collectives import collectives

C = SHAPE[-1]
OF_EXAMPLES = [norm for norm in NORMS if norm.name != "batch"]

on_devices = pytest.mark.parametrize("how", ["checked", "unchecked", "pmap"])
of_examples = pytest.mark.parametrize("norm", OF_EXAMPLES, ids=norm_id)
either_axis_type = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def shards_of(shape, masked):
    """x and the mask, if there is one."""
    return np.ones(shape, np.float32), np.ones(shape, bool) if masked else None


def exchanged(how, masked, groups=None):
    """The kind, numbers and devices of every collective in three programs.

    They are for y and the state; the gradient of x; those of x, scale and bias.
    """
    forward = functools.partial(normalized, groups=groups)

    def gradient(shards, params, argnums):
        x, where = shards
        loss = lambda x, params: jnp.sum(jnp.sin(forward((x, where), params)[0]))
        return jax.grad(loss, argnums)(x, params)

    programs = forward, *(functools.partial(gradient, argnums=which) for which in (0, (0, 1)))
    args = shards_of(SHAPE, masked), jn.init_params(C)
    found = [collectives(mapped(how, program), *args) for program in programs]
    return [[(c.kind, c.numbers, c.devices) for c in one] for one in found]


@masked_or_not
@on_devices
def test_batch_norm_exchanges_once_forward_and_once_backward(how, masked):
    forward, backward, training = exchanged(how, masked)
    # The mean (high and low part) and variance; the count is known unless there is a mask.
    table = ("all-gather", (4 if masked else 3) * C, 8)
    assert forward == [table]
    assert backward == [table, ("all-reduce", 2 * C, 8)]
    # With check_vma the gradients of scale and bias are sums, in the same exchange. The XLA of jax
    # 0.12 finds that they are those for dx, but for a factor.
    of_params = [2, 4] if how == "checked" else [2]
    assert training in [[table, ("all-reduce", n * C, 8)] for n in of_params]


@masked_or_not
@on_devices
def test_even_groups_exchange_among_themselves(how, masked):
    forward, backward, _ = exchanged(how, masked, EVEN)
    table = ("all-gather", (4 if masked else 3) * C, 4)
    assert forward == [table]
    assert backward == [table, ("reduce-scatter", 4 * 2 * C, 4)]


@pytest.mark.usefixtures("small_tables")
@masked_or_not
@on_devices
def test_statistics_are_summed_twice_where_that_is_faster(how, masked):
    most = 1200 // (4 * (4 if masked else 3))  # features that are gathered, in float32
    for features, kinds in ((most, ["all-gather"]), (most + 1, ["all-reduce"] * 2)):
        args = shards_of((8, 2, features), masked), jn.init_params(features)
        assert [c.kind for c in collectives(mapped(how, normalized), *args)] == kinds


@pytest.mark.usefixtures("small_tables")
@masked_or_not
def test_the_state_from_sums_is_known_to_be_the_same_on_all_devices(masked):
    shards = shards_of((8, 1200 // (4 * 3) + 1), masked)  # three statistics in float32
    norm = lambda shards: normalized(shards, None)
    state = jax.eval_shape(shard_map("checked", norm, (DATA,), (DATA, SAME), data=8), shards)[1]
    assert state.mean.shape == shards[0].shape[1:]


def of_x(norm):
    """The norm, and the gradient of its input."""
    return norm.__call__, jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))


@of_examples
@either_check
def test_norms_of_examples_exchange_nothing_in_shard_map(norm, how):
    x = np.ones((8, 4, 6), np.float32)
    for f in of_x(norm):
        assert collectives(shard_map(how, f, DATA, DATA, data=8), x) == []


@of_examples
@either_axis_type
def test_norms_of_examples_exchange_nothing_in_jit(norm, axis_type):
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    x = jax.device_put(np.ones((8, 4, 6), np.float32), NamedSharding(mesh, DATA))
    with jax.set_mesh(mesh):
        for f in of_x(norm):
            assert collectives(f, x) == []


@pytest.mark.parametrize("norm", [NORMS[1], NORMS[3]], ids=norm_id)
@either_axis_type
def test_features_over_devices_exchange_statistics_alone(norm, axis_type, rng):
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    x, weights = rng.standard_normal((2, 15, 16)).astype(np.float32)
    scale, bias = rng.standard_normal((2, 16)).astype(np.float32)

    def backward(x, scale, bias, weights):
        y, vjp = jax.vjp(lambda x: norm(x, scale, bias), x)
        return y, *vjp(weights)

    with jax.set_mesh(mesh):
        rows, features = (NamedSharding(mesh, jax.P(*axes, "data")) for axes in ([None], []))
        args = jax.device_put((x, scale, bias, weights), (rows, features, features, rows))
        # Of each row: mean (high and low part) and variance; then t_mean and q (statistics.py).
        forward = collectives(norm.__call__, *args[:3])
        for found, numbers in ((forward, 3), (collectives(backward, *args), 5)):
            assert {c.kind for c in found} == {"all-reduce"}
            assert sum(c.numbers for c in found) <= numbers * len(x)
        y, dx = jax.jit(backward)(*args)
    truth = oracle.gradient(x, weights * scale, (1,), 1e-6, subtract_mean=norm.subtract_mean)
    # The roundings of a few operations, and of sums of 16 terms.
    assert oracle.units(y, norm.truth(x, scale, bias)) < 4
    assert oracle.units(dx, truth) < 4


def test_a_sample_of_explicitly_sharded_features_is_not_moved():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((15, 1024)), NamedSharding(mesh, jax.P(None, "data")))
        found = collectives(jn.layer_norm, x)
    assert [(c.kind, c.numbers) for c in found] == [("all-reduce", 15), ("all-reduce", 30)]


@either_axis_type
def test_batch_norm_of_features_over_devices_exchanges_nothing(axis_type):
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((4, 16), np.float32), jax.P(None, "data"))
        mean, var = jax.device_put((np.zeros(16, np.float32), np.ones(16, np.float32)), DATA)
        state = jn.BatchNormState(mean, var, jnp.int32(0))
        assert collectives(lambda x, state: jn.batch_norm(x, state), x, state) == []
