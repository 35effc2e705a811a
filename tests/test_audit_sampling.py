"""The sampling error of batch statistics in an audit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm.core.moments import Moments
from jaxnorm.tools.audit_sampling import MIN_EXAMPLES, sampling_bounds, student_quantile
from jaxnorm.tools.batch_moments import BatchMoments, merge_batch_moments, no_batch_moments, observe

FEATURES, EXAMPLES, MOMENTUM = 16, 32, 0.9
# Programs that run once or twice.
pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.thorough]
measure = jax.jit(observe, static_argnums=(1, 2, 4))
merged = jax.jit(merge_batch_moments)


def truth(x, where=None) -> BatchMoments:
    """The batch moments of x, of shape (examples, positions, features), in float64."""
    x = np.asarray(x, np.result_type(x, np.float64))
    where = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    mean = np.mean(x, (0, 1), where=where)
    squared = np.abs(x - mean) ** 2
    var = np.mean(squared, (0, 1), where=where)
    norm = lambda a: np.sqrt(np.sum(np.abs(np.sum(a, 1, where=where)) ** 2, 0))
    elements = Moments(mean, var, where.sum((0, 1)))  # pyright: ignore[reportArgumentType]
    return BatchMoments(elements, where.any(1).sum(0), norm(x - mean), norm(squared - var))


def check(observed, right):
    for part, exact in zip(jax.tree.leaves(observed), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(part, exact, rtol=1e-5)  # float32, and sums near zero


@pytest.mark.parametrize("case", ["plain", "mask", "complex", "tiny"])
def test_what_is_seen(case, rng):
    x = 3 + 2 * rng.standard_normal((6, 4, 3))
    where = None
    if case == "mask":
        where = rng.random((6, 4, 1)) < 0.6
        where[2] = False
        assert truth(x, where).examples[0] == 5
    elif case == "complex":
        x = x + 1j * rng.standard_normal(x.shape)
    elif case == "tiny":
        x = 1e-15 * x  # the fourth power is no number of float32
    x = x.astype(np.complex64 if case == "complex" else np.float32)
    given = x if where is None else np.where(where, x, 1e6)
    check(measure(given, (3,), -1, where, None), truth(x, where))


def test_features_in_another_place_and_devices_that_share(rng):
    """Features first, examples sharded."""
    x = rng.standard_normal((3, 16, 4)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard, all_ = jax.P("data"), jax.P()
    f = lambda x: observe(x, (3,), 2, None, "data")
    observed = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=shard, out_specs=all_))(
        np.moveaxis(x, 0, 2)
    )
    check(observed, truth(np.moveaxis(x, 0, 2)))
    alone = measure(x, (3,), 0, None, None)  # each element is an example
    check(alone, truth(np.moveaxis(x.reshape(3, 64, 1), 0, 2)))


def test_two_calls(rng):
    """The bound is exact if a layer sees the same twice, and a bound if it does not."""
    x = rng.standard_normal((6, 4, 3)).astype(np.float32)
    one = measure(x, (3,), -1, None, None)
    check(merged(no_batch_moments(jnp.zeros(3)), one), truth(x))
    check(merged(one, one), truth(np.concatenate([x, x], 1)))
    z = (2 - x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)
    both, right = merged(one, measure(z, (3,), -1, None, None)), truth(np.concatenate([x, z], 1))
    check(both[:2], right[:2])
    assert (np.asarray(both.sums) >= right.sums).all()
    assert (np.asarray(both.squares) >= right.squares).all()


def rejected(
    draw, models, significance, rng, trained=EXAMPLES, batch_size=None, batches=25
) -> float:
    """The part of sound models that have a finding."""
    number = 0
    for _ in range(models):
        drawn = draw((batches, trained, FEATURES), rng)
        means, variances = drawn.mean(1), drawn.var(1)
        weights = MOMENTUM ** np.arange(batches)
        mean, var = (np.average(a, 0, weights) for a in (means, variances))
        observed = truth(draw((EXAMPLES, 1, FEATURES), rng))
        t = student_quantile(np.asarray(observed.examples), significance, 2 * FEATURES)
        distance, lowest, highest = sampling_bounds(observed, mean, var, MOMENTUM, 0, t, batch_size)
        v = observed.elements.var
        far = np.abs(observed.elements.mean - mean) > distance
        number += (far | (v < lowest) | (v > highest)).any()
    return number / models


@pytest.mark.parametrize("kind", ["normal", "relu"])
def test_a_sound_model_has_findings_no_more_often_than_the_level(kind):
    rng, models, significance = np.random.default_rng(0), 1000, 0.05
    draw = lambda size, rng: rng.standard_normal(size)
    if kind == "relu":
        draw = lambda size, rng: np.maximum(rng.standard_normal(size), 0)
    rate = rejected(draw, models, significance, rng)
    assert rate <= significance + 3 * np.sqrt(significance / models)  # three standard errors
    assert rate > 0.1 * significance  # nor does it find nothing


def test_batches_of_training_may_be_smaller():
    """`batch_size` explains their larger errors and smaller variances."""
    rng, models, significance = np.random.default_rng(0), 300, 0.05
    draw = lambda size, rng: rng.standard_normal(size)
    rate = rejected(draw, models, significance, rng, trained=4, batch_size=4, batches=60)
    assert rate <= significance + 3 * np.sqrt(significance / models)
    assert rejected(draw, models, significance, rng, trained=4, batches=60) > 4 * significance


def test_examples_of_different_lengths(rng):
    """Long examples have other values: the mean of means is not that of all elements."""
    lengths = rng.integers(1, 40, 200)
    x = rng.standard_normal((200, 40, 1)) + 0.1 * lengths[:, None, None]
    where = np.arange(40)[None, :, None] < lengths[:, None, None]
    all_seen, observed = truth(x, where), truth(x[:100], where[:100])
    mean, var, _ = (np.asarray(part) for part in all_seen.elements)
    t = student_quantile(np.asarray(observed.examples), 0.01, 2)
    distance, lowest, highest = sampling_bounds(observed, mean, var, 0.99, 0, t)
    assert abs(observed.elements.mean - mean) < distance < 0.6
    assert lowest < observed.elements.var < highest
    unweighted = np.mean(x[:100], 1, where=where[:100]).mean()
    assert abs(unweighted - mean) > distance


def test_rounding_of_running_statistics_is_explained(rng):
    """A running average stops moving where its steps are rounded away."""
    x = 1000 + rng.standard_normal((64, 100, 1))
    observed = truth(x)
    t = student_quantile(np.asarray(observed.examples), 0.001, 2)
    mean, momentum, half = np.float32(900), np.float32(0.99), jnp.bfloat16
    for _ in range(2000):
        mean = np.asarray(momentum * mean + (1 - momentum) * np.float32(1000), half).astype(
            np.float32
        )
    assert mean == 900  # steps of 1, where half a unit is 2
    options = {"mean": np.array([900.0]), "var": np.array([1.0]), "momentum": 0.99, "t": t}
    distance, *_ = sampling_bounds(observed, rounding=0, **options)
    assert distance < 100
    distance, *_ = sampling_bounds(observed, rounding=float(jnp.finfo(half).eps), **options)
    assert distance > 100


def test_running_statistics_of_a_small_momentum_are_less_exact(rng):
    """They are an average of three batches, effectively, at 0.5: (1 + m) / (1 - m)."""
    observed, one = truth(rng.standard_normal((64, 1, 1))), np.ones(1)
    t = student_quantile(np.asarray(observed.examples), 0.001, 2)
    exact, average = (
        sampling_bounds(observed, one, one, momentum, 0, t)[0] for momentum in (1.0, 0.5)
    )
    np.testing.assert_allclose(average, exact * np.sqrt(1 + 1 / 3))


@pytest.mark.parametrize("significance", [0.9, 0.05, 1e-9, 1e-250])
def test_the_quantile_is_that_of_scipy(significance):
    special = pytest.importorskip("scipy.special", reason="scipy is not installed")
    examples = np.array([MIN_EXAMPLES, 9, 33, 1000, 1e6])
    right = -special.stdtrit(examples - 1, significance / 10)
    np.testing.assert_allclose(student_quantile(examples, significance, 5), right, rtol=1e-9)


def test_few_examples_are_not_tested():
    t = student_quantile(np.array([0, MIN_EXAMPLES - 1, MIN_EXAMPLES, 1e6]), 0.05, 1)
    assert np.isnan(t[:2]).all()
    np.testing.assert_allclose(t[2:], [2.364624, 1.959966], rtol=1e-6)  # of published tables
