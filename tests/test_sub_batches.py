"""Batches in parts: ghost batch norm, microbatches, padding."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm as jn
import jaxnorm.linen
import jaxnorm.nnx
from benchmarks.accelerators.collectives import collectives


@pytest.fixture
def x(rng):
    apart = 10 * np.arange(12).reshape(12, 1, 1) // 4  # the sub-batches differ
    return jnp.asarray(rng.standard_normal((12, 5, 3)) + apart, jnp.float32)


def assert_close(ours, right, tol=1e-6):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def by_hand(x, params, where=None, size=4):
    """Split, normalize each part, and commit what was measured of all of them once."""
    state, ys, measured = jn.init_batch_norm_state(3), [], jn.Moments(*jnp.zeros((3, 3)))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        w = None if where is None else where[part]
        ys.append(jn.batch_norm(x[part], state, params=params, where=w)[0])
        measured = jn.merge_moments(measured, jn.moments(x[part], (0, 1), where=w))
    return jnp.concatenate(ys), jn.update_batch_norm_state(state, measured)


def ghost(x, params, where=None, size=4):
    state = jn.init_batch_norm_state(3)
    return jn.batch_norm(x, state, params=params, where=where, virtual_batch_size=size)


@pytest.mark.parametrize("masked", [False, True])
def test_ghost_batch_norm_is_splitting_by_hand(masked, x, rng):
    params = jn.NormParams(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0]))
    # Of the last sub-batch nothing counts.
    where = jnp.asarray(rng.random((12, 5, 1)) < 0.6).at[8:].set(False) if masked else None
    assert_close(ghost(x, params, where), by_hand(x, params, where))

    def loss(norm):
        return lambda x, params: jnp.sum(jnp.sin(norm(x, params, where)[0]) * (1 + x % 1))

    gradients = [jax.grad(loss(norm), (0, 1))(x, params) for norm in (ghost, by_hand)]
    assert_close(*gradients, tol=1e-5)  # sums of 60 numbers, in another order


def test_a_sub_batch_of_the_whole_batch_is_batch_norm(x):
    params = jn.init_params(3)
    whole = jn.batch_norm(x, jn.init_batch_norm_state(3), params=params)
    assert_close(ghost(x, params, size=12), whole)


@pytest.mark.parametrize("axes", [0, 2, (0, 2)], ids=str)
def test_sub_batches_are_of_the_first_axis_without_features(axes, x):
    x = jnp.moveaxis(x, 0, 1)  # the batch comes second
    shape = tuple(np.array(x.shape)[np.atleast_1d(axes)])
    state = jn.init_batch_norm_state(shape)
    batch = 1 if axes != 2 else 0
    size = x.shape[batch] // (4 if batch else 5)
    y, _ = jn.batch_norm(x, state, feature_axis=axes, virtual_batch_size=size)
    parts = jnp.split(x, x.shape[batch] // size, batch)
    right = [jn.batch_norm(part, state, feature_axis=axes)[0] for part in parts]
    assert_close(y, jnp.concatenate(right, batch))


def test_evaluation_knows_no_sub_batches(x):
    state = jn.init_batch_norm_state(3)
    y, _ = jn.batch_norm(x[:7], state, train=False, virtual_batch_size=4)
    assert_close(y, jn.batch_norm(x[:7], state, train=False)[0])


def test_the_modules_have_it_too(x):
    y, state = ghost(x, None)
    linen = jaxnorm.linen.BatchNorm(use_running_average=False, virtual_batch_size=4)
    variables = linen.init(jax.random.key(0), x)
    ours, updates = linen.apply(variables, x, mutable=["batch_stats"])
    stats = updates["batch_stats"]
    assert_close((ours, stats["mean"], stats["var"]), (y, state.mean, state.var))
    module = jaxnorm.nnx.BatchNorm(3, virtual_batch_size=4, rngs=nnx.Rngs(0))
    assert_close((module(x), module.mean[...], module.var[...]), (y, state.mean, state.var))
    flax = inspect.signature(nnx.BatchNorm.__init__).parameters
    with_own = inspect.signature(jaxnorm.nnx.BatchNorm.__init__).parameters
    assert [*with_own] == [*flax, "virtual_batch_size", "scale_offset", "renorm"]


@pytest.mark.parametrize("check_vma", [True, False])
def test_on_many_devices_sub_batches_are_local_and_the_state_is_of_all(check_vma, x):
    mesh = jax.make_mesh((3,), ("data",), axis_types=(AxisType.Auto,))
    state = jn.init_batch_norm_state(3)
    norm = jax.jit(
        jax.shard_map(
            lambda x: jn.batch_norm(x, state, "data", virtual_batch_size=2),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=(P("data"), P()),
            check_vma=check_vma,
        )
    )
    assert_close(norm(x), ghost(x, None, size=2))
    assert not collectives(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)[0]))), x)
    # The state can be differentiated, across devices too.
    of_state = lambda norm: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(norm(x)[1].var))))(x)
    assert_close(of_state(norm), of_state(lambda x: jn.batch_norm(x, state)), tol=1e-6)


@pytest.mark.parametrize("size", [5, 0, -4, 24])
def test_a_size_that_does_not_divide_the_batch_is_an_error(size, x):
    with pytest.raises(ValueError, match="virtual_batch_size must be a positive integer"):
        ghost(x, None, size=size)
    with pytest.raises(ValueError, match="batch axis that virtual_batch_size divides"):
        jn.batch_norm(jnp.ones(3), jn.init_batch_norm_state(3), virtual_batch_size=1)


@pytest.mark.parametrize("masked", [False, True])
def test_microbatches_under_scan_are_committed_once(masked, x, rng):
    w = jnp.asarray(rng.standard_normal((3, 3)), jnp.float32)
    where = jnp.asarray(rng.random((12, 5, 1)) < 0.6) if masked else jnp.ones((12, 5, 1), bool)
    state = jn.init_batch_norm_state(3)

    def loss(w, x, where):
        h = x @ w
        y, _ = jn.batch_norm(h, state, where=where)
        return jnp.sum(jnp.sin(y)), jn.moments(h, (0, 1), where=where)

    def accumulate(carry, microbatch):
        gradient, measured = carry
        (value, new), g = jax.value_and_grad(loss, has_aux=True)(w, *microbatch)
        return (gradient + g, jn.merge_moments(measured, new)), value

    start = (jnp.zeros_like(w), jn.Moments(*jnp.zeros((3, 3))))
    microbatches = [a.reshape(3, 4, *a.shape[1:]) for a in (x, where)]
    (gradient, measured), _ = jax.lax.scan(accumulate, start, microbatches)
    right = sum(
        jax.grad(loss, has_aux=True)(w, *part)[0] for part in zip(*microbatches, strict=True)
    )
    assert_close(gradient, right, tol=2e-5)  # sums of 60 numbers, in another order
    whole = jn.batch_norm(x @ w, state, where=where)[1]
    assert_close(jn.update_batch_norm_state(state, measured), whole, tol=1e-5)


def test_any_batch_can_be_spread_over_the_devices(x):
    x, weights = x[:11], jnp.arange(11.0)[:, None, None]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    state = jn.init_batch_norm_state(3)

    def spread(x):
        padded, real = jn.pad_batch({"x": x, "weights": weights}, 8)

        def norm(batch, real):
            y, new = jn.batch_norm(batch["x"], state, "data", where=real[:, None, None])
            own = jnp.sum(jnp.sin(y) * batch["weights"], where=real[:, None, None])
            return y, new, jax.lax.psum(own, "data")

        mapped = jax.shard_map(norm, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P(), P()))
        y, new, loss = mapped(padded, real)
        return loss, (y[:11], new)

    dx, (y, new) = jax.grad(spread, has_aux=True)(x)
    wide = oracle.wide(x)
    assert_close(y, oracle.batch_norm(wide), tol=3e-6)
    assert_close(new, jn.batch_norm(x, state)[1])
    dy = np.cos(oracle.batch_norm(wide)) * np.asarray(weights)
    assert_close(dx, oracle.gradient(wide, dy, (0, 1), 1e-5), tol=3e-5)


def test_padding_keeps_what_divides_and_the_kind_of_array():
    x = np.ones((8, 2), np.float16)
    same, real = jn.pad_batch(x, 4)
    assert isinstance(same, np.ndarray)
    assert same.shape == (8, 2)
    assert real.all()
    padded, real = jn.pad_batch((jnp.ones((0, 2), jnp.bfloat16), jnp.ones(0, jnp.int32)), 4)
    assert [a.shape for a in padded] == [(0, 2), (0,)]
    assert isinstance(real, jax.Array)
    padded, _ = jax.jit(jn.pad_batch, static_argnums=1)(jnp.ones((5, 2), jnp.bfloat16), 4)
    assert (padded.shape, padded.dtype) == ((8, 2), jnp.bfloat16)


def test_padding_says_what_it_needs():
    with pytest.raises(ValueError, match="one number of examples"):
        jn.pad_batch((np.ones(3), np.ones(4)), 2)
    with pytest.raises(ValueError, match="one number of examples"):
        jn.pad_batch(np.float32(3), 2)
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        jn.pad_batch(np.ones(3), 0)
    with pytest.raises(TypeError, match="multiple must be an integer"):
        jn.pad_batch(np.ones(3), 2.0)  # pyright: ignore[reportArgumentType]
