"""The running state of batch norm. Statistics across devices are in test_devices.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxnorm as jn


def batches(rng, steps=5, shape=(16, 3)):
    return [jnp.asarray(rng.standard_normal(shape) * 2 + 5, jnp.float32) for _ in range(steps)]


def run(xs, state, **options):
    for x in xs:
        state = jn.batch_norm(x, state, **options)[1]
    return state


def test_training_moves_the_state_and_evaluation_returns_it(rng):
    (x,) = batches(rng, 1)
    state = jn.BatchNormState(jnp.ones(3), 4 * jnp.ones(3), jnp.int32(7))
    y, same = jn.batch_norm(x, state, train=False, epsilon=0.0)
    np.testing.assert_allclose(y, (x - 1) / 2, rtol=1e-6)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, state))
    new = jn.batch_norm(x, state, momentum=0.9)[1]
    np.testing.assert_allclose(new.mean, 0.9 + 0.1 * np.mean(x, 0), rtol=1e-6)
    np.testing.assert_allclose(new.var, 3.6 + 0.1 * np.var(x, 0), rtol=1e-6)
    assert new.count == 8
    assert new.count.dtype == jnp.int32


def test_momentum_none_is_the_average_of_all_updates(rng):
    xs = batches(rng)
    state = run(xs, jn.init_batch_norm_state(3), momentum=None)
    np.testing.assert_allclose(state.mean, np.mean([np.mean(x, 0) for x in xs], 0), rtol=1e-5)
    np.testing.assert_allclose(state.var, np.mean([np.var(x, 0) for x in xs], 0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends_keeps_nothing_or_all(momentum, rng):
    (x,) = batches(rng, 1)
    state = jn.batch_norm(x, jn.init_batch_norm_state(3), momentum=momentum)[1]
    np.testing.assert_allclose(state.mean, (1 - momentum) * np.mean(x, 0), rtol=1e-6)


def test_momentum_may_be_traced(rng):
    xs, initial = batches(rng), jn.init_batch_norm_state(3)
    step = jax.jit(lambda x, state, momentum: jn.batch_norm(x, state, momentum=momentum)[1])
    state = step(xs[0], initial, jnp.float32(0.25))
    expected = jn.batch_norm(xs[0], initial, momentum=0.25)[1]
    np.testing.assert_allclose(state.mean, expected.mean, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_state_is_pytorchs(momentum, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    module = torch.nn.BatchNorm1d(3, momentum=momentum)
    xs = batches(rng)
    for x in xs:
        module(torch.tensor(np.asarray(x)))
    keep = None if momentum is None else 1 - momentum
    state = run(xs, jn.init_batch_norm_state(3), momentum=keep, ddof=1)
    np.testing.assert_allclose(state.mean, module.running_mean, rtol=1e-5)
    np.testing.assert_allclose(state.var, module.running_var, rtol=1e-5)
    assert int(state.count) == int(module.num_batches_tracked)


def test_ddof_with_a_single_element_is_finite():
    state = jn.batch_norm(jnp.ones((1, 3)), jn.init_batch_norm_state(3), ddof=1)[1]
    assert jnp.isfinite(state.var).all()


def test_features_of_which_nothing_counts_keep_their_state(rng):
    (x,) = batches(rng, 1)
    where = jnp.array([[True, False, True]])
    state = jn.batch_norm(x, jn.init_batch_norm_state(3), where=where, momentum=0.0)[1]
    np.testing.assert_allclose(state.mean[1:2], 0)
    np.testing.assert_allclose(state.var[1:2], 1)
    assert (state.mean[::2] != 0).all()
    assert state.count == 1
    unmoved = jn.batch_norm(x, state, where=jnp.zeros((1, 3), bool))[1]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, unmoved, state))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_state_keeps_its_dtype_through_scan(dtype, rng):
    xs = jnp.stack(batches(rng)).astype(dtype)
    state = jn.init_batch_norm_state(3, dtype if dtype == jnp.complex64 else jnp.float32)

    def step(state, x):
        y, state = jn.batch_norm(x, state)
        return state, y

    final, ys = jax.lax.scan(step, state, xs)
    assert jax.tree.map(jnp.result_type, final) == jax.tree.map(jnp.result_type, state)
    assert ys.dtype == dtype


def test_several_feature_axes(rng):
    x = jnp.asarray(rng.standard_normal((4, 3, 5, 2)), jnp.float32)
    state = jn.init_batch_norm_state((3, 2))
    y, new = jn.batch_norm(x, state, params=jn.init_params((3, 2)), feature_axis=(-1, 1))
    flat = jnp.moveaxis(x, 1, 2).reshape(4, 5, 6)
    expected = oracle.batch_norm(np.asarray(flat)).reshape(4, 5, 3, 2)
    np.testing.assert_allclose(jnp.moveaxis(y, 1, 2), expected, atol=2e-6)
    assert new.mean.shape == (3, 2)


def test_a_state_cast_down_serves_evaluation(rng):
    (x,) = batches(rng, 1)
    state = jn.BatchNormState(jnp.full(3, 5.0), jnp.full(3, 4.0), jnp.int32(9))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state)  # exact for these numbers
    y, _ = jn.batch_norm(x, half, train=False)
    np.testing.assert_array_equal(y, jn.batch_norm(x, state, train=False)[0])


def test_vmap_over_many_examples_takes_memory_in_proportion():
    state = jn.init_batch_norm_state(8)
    norm = jax.vmap(lambda x: jn.batch_norm(x, state, "i")[0], axis_name="i")

    def scratch(examples):
        x = jax.ShapeDtypeStruct((examples, 4, 8), "float32")
        memory: Any = jax.jit(norm).lower(x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert scratch(2048) <= 10 * scratch(256)  # 8 times as many; a table would take 64 times


def test_numpy_numbers_are_numbers(rng):
    (x,) = batches(rng, 1, (4, 6))
    state = jn.init_batch_norm_state(6)
    numbers = jn.batch_norm(x, state, momentum=0.5, epsilon=1e-3, feature_axis=1, ddof=1)
    options: dict[str, Any] = {
        "momentum": np.float32(0.5),
        "epsilon": np.float32(1e-3),
        "feature_axis": np.array(1),
        "ddof": np.int64(1),
    }
    numpys = jn.batch_norm(x, state, **options)
    for a, b in zip(jax.tree.leaves(numbers), jax.tree.leaves(numpys), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    two: Any = np.int64(2)
    groups = jn.group_norm(x, num_groups=two)
    np.testing.assert_array_equal(groups, jn.group_norm(x, num_groups=2))
