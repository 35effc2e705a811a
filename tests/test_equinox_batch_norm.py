"""BatchNorm of Equinox and of jaxnorm.equinox: training, inference, named axes, hard data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from beside_equinox import (
    BOTH,
    MODES,
    TOL,
    as_equinox,
    close,
    eqx,
    errors,
    jn,
    make,
    mapped,
)
from jax.sharding import Mesh, PartitionSpec


def train(nn, xs, dy, **arguments):
    """Results and gradients of a step for each x, and the result in inference."""
    norm, state = make(nn, "BatchNorm", **arguments)

    def loss(args, state):
        norm, x = args
        y, state = mapped(norm)(x, state)
        # The state has a gradient too, so that all of it is compared.
        averages = sum(jnp.sum(a) for a in jax.tree.leaves(state) if eqx.is_inexact_array(a))
        return jnp.sum(y * dy) + averages, (y, state)

    def step(state, x):
        gradients, (y, state) = eqx.filter_grad(loss, has_aux=True)((norm, x), state)
        return state, (y, *jax.tree.leaves(gradients), *jax.tree.leaves(state))

    with as_equinox(nn):
        state, steps = eqx.filter_jit(jax.lax.scan)(step, state, xs)
        return steps, mapped(eqx.nn.inference_mode(norm))(xs[0], state)[0]


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    ("mode", "shape", "arguments"),
    [
        ("batch", (8, 6, 4, 3), {}),
        ("ema", (8, 6, 4, 3), {}),
        ("ema", (16, 6), {"channelwise_affine": False, "momentum": 0.5, "eps": 0.1}),
    ],
)
def test_three_steps_and_inference_are_those_of_equinox(mode, shape, arguments, rng):
    xs = jnp.asarray(rng.normal(1, 2, (3, *shape)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=shape), jnp.float32)
    theirs, ours = (train(nn, xs, dy, mode=mode, **arguments) for nn in BOTH)
    close(ours[0], theirs[0])
    # Equinox divides by 1 - momentum**count, which cancels: by three updates at 0.99, to a 33rd.
    close(ours[1], theirs[1], 33 * TOL)


@pytest.mark.usefixtures("unoptimized")
def test_complex_values_are_those_of_equinox(rng):
    x = jnp.asarray(rng.normal(1, 2, (5, 6, 3)) + 1j * rng.normal(size=(5, 6, 3)), jnp.complex64)

    def results(nn, x):
        pairs = [make(nn, "BatchNorm", mode=mode, dtype=jnp.complex64) for mode in MODES]
        return [mapped(norm)(x, state) for norm, state in pairs]

    theirs, ours = (jax.jit(results, static_argnums=0)(nn, x) for nn in BOTH)
    close(jax.tree.leaves(ours), jax.tree.leaves(theirs))


def test_averages_whose_mean_is_much_larger_than_the_deviations(rng):
    x = jnp.asarray(rng.normal(1e4, 1, (64, 6, 8, 8)), jnp.float32)
    old = jnp.asarray(rng.normal(1e4, 1, 6), jnp.float32), jnp.full(6, 2, jnp.float32)
    measured = [np.ravel(a) for a in oracle.statistics(oracle.wide(x), (0, 2, 3))[:2]]
    moved = [0.9 * oracle.wide(a) + 0.1 * b for a, b in zip(old, measured, strict=True)]

    def truth(mean, var):
        return (oracle.wide(x) - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)

    def found(nn):
        norm, first = make(nn, "BatchNorm", mode="ema", momentum=0.9, channelwise_affine=False)
        later = eqx.tree_at(jax.tree.leaves, first, [jnp.array(False), *old])
        return jax.jit(lambda x: [mapped(norm)(x, state)[0] for state in (first, later)])(x)

    for y, z, right in zip(*map(found, BOTH), [truth(*measured), truth(*moved)], strict=True):
        assert oracle.units(z, right) < 4
        assert oracle.units(y, right) > 20


def test_equinox_issue_876_half_precision(rng):
    x = jnp.asarray(rng.normal(200, 3, (16, 6, 8, 8)), jnp.bfloat16)
    theirs, ours = (error * float(np.finfo(np.float32).eps) for error in errors("BatchNorm", x))
    assert ours <= float(jnp.finfo(jnp.bfloat16).eps)  # of the result, rounded once
    assert theirs > 8 * ours


def test_debiasing_does_not_cancel():
    norm, state = make(jn, "BatchNorm", momentum=0.999, channelwise_affine=False)
    mean, var = jnp.arange(1, 7, dtype=jnp.float32), jnp.full(6, 0.25, jnp.float32)
    kept = float(np.float32(0.001))
    state = state.set(norm.batch_counter, jnp.array(1))
    state = state.set(norm.batch_state_index, (mean * kept, var * kept))
    y, _ = norm(jnp.zeros(6), state, inference=True)
    assert oracle.units(y, -np.arange(1, 7) / np.sqrt(0.25 + 1e-5)) < 4


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    ("mode", "how"), [("batch", "vmap"), ("batch", "shard_map"), ("ema", "shard_map")]
)
def test_statistics_are_shared_over_several_names(mode, how, rng):
    x = jnp.asarray(rng.normal(1, 2, (16, 6, 3)), jnp.float32)
    dy = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def results(names, over):
        norm, state = make(jn, "BatchNorm", mode=mode)
        norm = eqx.tree_at(lambda norm: norm.axis_name, norm, names)

        def loss(x):
            y, after = over(mapped(norm))(x, state)
            return jnp.sum(y * dy), (y, jax.tree.leaves(after))

        return jax.jit(jax.grad(loss, has_aux=True))(x)

    def twice(f):
        def call(x, state):
            y, state = mapped(f, "a")(x.reshape(4, 4, *x.shape[1:]), state)
            return y.reshape(x.shape), state

        return call

    def sharded(f):
        mesh, spec = Mesh(np.array(jax.devices()[:4]), ("a",)), PartitionSpec("a")
        specs = (spec, PartitionSpec())
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)

    names = ["a", "b"] if how == "vmap" else ("a", "b")
    over = {"vmap": twice, "shard_map": sharded}[how]
    close(results(names, over), results("b", lambda f: f))


def test_a_state_in_float64(x64):
    for mode in MODES:
        norm, state = make(jn, "BatchNorm", mode=mode, dtype=None)  # Equinox's default
        y, after = jax.eval_shape(mapped(norm), jnp.ones((5, 6), jnp.float32), state)
        assert y.dtype == jnp.float32
        assert jax.tree.leaves(after)[1].dtype == jnp.float64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nn", BOTH)
def test_an_unbound_name_is_a_name_error(nn, mode):
    for over in (lambda norm: norm, lambda norm: mapped(norm, "other")):
        norm, state = make(nn, "BatchNorm", mode=mode)
        with pytest.raises(NameError) as raised:
            over(norm)(jnp.ones((6, 6)), state)
        assert isinstance(raised.value, ValueError) == (nn is jn)


def test_inference_is_known_while_tracing(rng):
    norm, state = make(jn, "BatchNorm")
    x = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
    call = lambda flag: mapped(functools.partial(norm, inference=flag))(x, state)[0]
    with pytest.raises(TypeError, match=r"^inference must be a Python bool, got \w*Tracer; mark"):
        jax.jit(call)(True)
    np.testing.assert_array_equal(call(1), call(True))
    assert (call(True) != call(False)).any()
