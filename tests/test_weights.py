"""Weight norm, spectral norm and standardized weights: the functions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm as jn

SHAPE = (3, 4, 5, 6)
MAGNITUDES = [1.0, 1e30, 1e-30]
KEY = jax.random.key(0)


def draw(rng, shape=SHAPE, magnitude=1.0):
    return (magnitude * rng.standard_normal(shape)).astype(np.float32)


def value_and_gradients(f, dy, *args):
    """Of one compiled program."""

    @jax.jit
    def run(*args):
        y, backward = jax.vjp(f, *args)
        return y, backward(jnp.asarray(dy, y.dtype))

    return run(*map(jnp.asarray, args))


def assert_rounded_once(y, truth):
    """To the nearest bfloat16."""
    rounding = 0.51 * float(jnp.finfo(jnp.bfloat16).eps) * np.abs(truth).max()
    np.testing.assert_allclose(np.asarray(y, np.float64), truth, atol=rounding, rtol=0)


# Weight norm


@pytest.mark.parametrize("feature_axis", [0, (0, 2), ()], ids=str)
def test_weight_norm(feature_axis, rng):
    options: Any = {"feature_axis": np.asarray(feature_axis, int)}
    axes = oracle.other_axes(np.empty(SHAPE), options["feature_axis"])
    v, dw = draw(rng), draw(rng)
    lengths = oracle.two_norm(v, axes).squeeze(axes)
    g = draw(rng, lengths.shape)
    f = functools.partial(jn.weight_norm, feature_axis=feature_axis)
    w, (dv, dg) = value_and_gradients(f, dw, v, g)
    assert oracle.units(w, oracle.weight_norm(v, g, **options)) < 4
    right_dv, right_dg = oracle.weight_norm_gradient(v, g, dw, **options)
    assert oracle.units(dv, right_dv) < 4
    assert oracle.units(dg, right_dg) < 8  # sums of up to 360 terms of both signs
    kept, measured = jn.init_weight_norm(v, feature_axis=feature_axis)
    np.testing.assert_array_equal(kept, v)
    np.testing.assert_allclose(measured, lengths, rtol=1e-6)
    np.testing.assert_allclose(f(kept, measured), v, rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_weight_norm_of_any_magnitude(magnitude, epsilon, rng):
    v, g, dw = draw(rng, magnitude=magnitude), draw(rng, 6), draw(rng)
    f = functools.partial(jn.weight_norm, epsilon=epsilon)
    w, (dv, dg) = value_and_gradients(f, dw, v, g)
    right_dv, right_dg = oracle.weight_norm_gradient(v, g, dw, epsilon=epsilon)
    largest = np.abs(right_dv).max()
    assert oracle.units(w, oracle.weight_norm(v, g, epsilon=epsilon)) < 4
    assert oracle.units(dg, right_dg) < 4
    assert oracle.units(dv / largest, right_dv / largest) < 4


@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
def test_weight_norm_of_zeros(epsilon, rng):
    v, g, dw = jnp.zeros(SHAPE), draw(rng, 6), draw(rng)
    w, (dv, dg) = value_and_gradients(functools.partial(jn.weight_norm, epsilon=epsilon), dw, v, g)
    assert not w.any()
    assert not dg.any()
    expected = oracle.weight_norm_gradient(v, g, dw)[0] if epsilon else np.zeros(SHAPE)
    np.testing.assert_allclose(dv, expected, rtol=1e-6)
    second = jax.jit(jax.grad(lambda v: jnp.sum(jax.grad(lambda v: jn.weight_norm(v, g).sum())(v))))
    assert jnp.isfinite(second(v)).all()


def test_lengths_of_bfloat16_weights_are_measured_in_float32(rng):
    w = jnp.asarray(draw(rng), jnp.bfloat16)
    v, g = jn.init_weight_norm(w)
    assert g.dtype == jnp.float32
    right = oracle.two_norm(w.astype(jnp.float32), (0, 1, 2))
    assert oracle.units(g, right.squeeze()) < 2
    assert jnp.array_equal(jn.weight_norm(v, g), w)


def test_complex_weight_norm(rng):
    v = jnp.asarray(draw(rng) + 1j * draw(rng), jnp.complex64)
    right = oracle.wide(v) / oracle.two_norm(v, (0, 1, 2))
    assert oracle.units(jn.weight_norm(v, jnp.ones(6)), right) < 4


# Standardized weights


@pytest.mark.parametrize("fan_in", [False, True])
@pytest.mark.parametrize("feature_axis", [-1, (0, 2)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_standardize_weight(mean, feature_axis, fan_in, rng):
    w, gain = draw(rng) + np.float32(mean), draw(rng, (6,) if feature_axis == -1 else (3, 5))
    options: Any = {"feature_axis": feature_axis, "fan_in": fan_in}
    y = jax.jit(functools.partial(jn.standardize_weight, **options))(w, gain)
    assert oracle.units(y, oracle.standardize_weight(w, gain, **options)) < 4


@pytest.mark.parametrize("fan_in", [False, True])
def test_gradients_of_standardized_weights(fan_in, rng):
    w, gain, dy = draw(rng) + np.float32(3), draw(rng, 6), draw(rng)
    f = functools.partial(jn.standardize_weight, fan_in=fan_in)
    _, (dw, dgain) = value_and_gradients(f, dy, w, gain)
    axes, factor = (0, 1, 2), 60**-0.5 if fan_in else 1.0
    epsilon = 0.0 if fan_in else 1e-6
    assert oracle.units(dw, oracle.gradient(w, factor * dy * oracle.wide(gain), axes, epsilon)) < 4
    assert oracle.units(dgain, (oracle.standardize_weight(w, fan_in=fan_in) * dy).sum(axes)) < 4


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-4])
def test_the_variance_times_the_fan_in_is_at_least_epsilon(magnitude, rng):
    w, dy = draw(rng, magnitude=magnitude), draw(rng)
    w[..., 0] = draw(rng, SHAPE[:-1])  # one feature has a variance
    f = functools.partial(jn.standardize_weight, fan_in=True, epsilon=1e-4)
    y, (dw,) = value_and_gradients(f, dy, w)
    np.testing.assert_allclose(
        y, oracle.standardize_weight(w, fan_in=True, epsilon=1e-4), rtol=1e-5, atol=1e-7
    )
    constant = (dy - dy.mean((0, 1, 2)))[..., 1:] / 1e-2
    np.testing.assert_allclose(dw[..., 1:], constant, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fan_in", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_weights_that_are_all_the_same_become_zero(epsilon, fan_in, rng):
    f = functools.partial(jn.standardize_weight, epsilon=epsilon, fan_in=fan_in)
    y, (dw,) = value_and_gradients(f, draw(rng), jnp.full(SHAPE, 0.1))
    np.testing.assert_allclose(y, 0, atol=1e-4)  # rounding of the mean, divided by 1e-3
    assert jnp.isfinite(dw).all()


@pytest.mark.parametrize("fan_in", [False, True])
def test_statistics_of_bfloat16_weights_are_float32(fan_in, rng):
    w = jnp.asarray(draw(rng) + 20, jnp.bfloat16)
    y = jn.standardize_weight(w, jnp.ones(6), fan_in=fan_in)
    assert y.dtype == jnp.bfloat16
    right = oracle.standardize_weight(w.astype(jnp.float32), fan_in=fan_in)
    assert_rounded_once(y, right)


# Spectral norm


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_spectral_norm_of_any_magnitude(magnitude, rng):
    w, dy = draw(rng, magnitude=magnitude), draw(rng)
    state = jn.init_spectral_norm_state(w, KEY)
    f = functools.partial(jn.spectral_norm, state=state, steps=3, epsilon=0.0)
    y, (dw,) = value_and_gradients(lambda w: f(w)[0], dy, w)
    u, v, sigma = oracle.power_iteration(w, state.u, 3)
    moved = f(w)[1]
    assert (moved.u.shape, moved.v.shape) == ((6,), (3, 4, 5))
    assert oracle.units(moved.u, u) < 4
    assert oracle.units(moved.v.ravel(), v) < 4
    assert oracle.units(y, oracle.wide(w) / sigma) < 4
    right = oracle.spectral_gradient(w, u, v, dy)
    largest = np.abs(right).max()
    assert oracle.units(dw / largest, right / largest) < 8  # of two sums


def test_many_steps_find_the_largest_singular_value(rng):
    w = draw(rng)
    state = jn.init_spectral_norm_state(w, KEY, feature_axis=1)
    y, state = jn.spectral_norm(w, state, steps=200, feature_axis=1)
    sigma = np.linalg.svd(oracle.matrix(w, 1), compute_uv=False)[0]
    assert oracle.units(y, oracle.wide(w) / sigma) < 4
    again, same = jn.spectral_norm(w, state, train=False, feature_axis=1)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, same, state))
    assert oracle.units(again, y) < 2


def test_zeros_give_zeros_and_leave_u_for_later(rng):
    w = draw(rng)
    state = jn.init_spectral_norm_state(jnp.zeros(SHAPE), KEY)
    f = lambda w: jn.spectral_norm(w, state)[0]
    y, (dw,) = value_and_gradients(f, draw(rng), jnp.zeros(SHAPE))
    assert not y.any()
    assert jnp.abs(dw).max() < 10  # that of a division by one
    np.testing.assert_array_equal(jn.spectral_norm(w, state, train=False)[0], w)  # v is zero
    _, state = jn.spectral_norm(jnp.zeros(SHAPE), state)
    assert oracle.units(f(w), oracle.wide(w) / oracle.power_iteration(w, state.u, 1)[2]) < 4


def test_a_sigma_up_to_epsilon_divides_nothing(rng):
    w = draw(rng, magnitude=1e-30)
    state = jn.init_spectral_norm_state(w, KEY)
    np.testing.assert_array_equal(jn.spectral_norm(w, state)[0], w)


@pytest.mark.parametrize("magnitude", [1.0, 1e-7, 1e-30])
def test_initial_weight_norm_gives_the_weights_again(magnitude, rng):
    w = draw(rng, magnitude=magnitude)
    assert oracle.units(jn.weight_norm(*jn.init_weight_norm(w)), w) < 4


def test_spectral_norm_of_bfloat16_weights(rng):
    w = jnp.asarray(draw(rng), jnp.bfloat16)
    state = jn.init_spectral_norm_state(w, KEY)
    y, moved = jn.spectral_norm(w, state, steps=2)
    assert {a.dtype for a in (*state, *moved)} == {jnp.dtype(jnp.float32)}
    wide = np.asarray(w, np.float64)
    right = wide / oracle.power_iteration(wide, state.u, 2)[2]
    assert_rounded_once(y, right)


def test_complex_spectral_norm(rng):
    w = jnp.asarray(draw(rng) + 1j * draw(rng), jnp.complex64)
    y, _ = jn.spectral_norm(w, jn.init_spectral_norm_state(w, KEY), steps=200)
    sigma = np.linalg.svd(oracle.matrix(w), compute_uv=False)[0]
    assert oracle.units(y, oracle.wide(w) / sigma) < 4


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("spec", [("m", None), (None, "m"), ("n", "m")], ids=str)
@pytest.mark.thorough
def test_spectral_norm_of_sharded_weights(spec, steps, axis_type, rng):
    """Of rows, of features, and of both; the new state is sharded as the old one is."""
    mesh = jax.make_mesh((2, 4), ("n", "m"), (axis_type,) * 2)
    w = rng.standard_normal((8, 16)).astype(np.float32)
    state = jn.init_spectral_norm_state(w, jax.random.key(0))

    def call(w, state):
        y, moved = jn.spectral_norm(w, state, steps=steps)
        return jnp.sum(y**3), (y, moved)

    gradient = jax.value_and_grad(call, has_aux=True)
    (_, right), right_grad = gradient(w, state)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P(*spec)))
        states = [jn.init_spectral_norm_state(sharded, jax.random.key(0))]
        places = zip(states[0], (spec[1:], spec[:1]), strict=True)
        states += [jn.SpectralNormState(*(jax.device_put(a, P(*place)) for a, place in places))]
        for given in (*states, state):  # the last was made before the weights were sharded
            (_, (y, moved)), grad = jax.jit(gradient)(sharded, given)
            # u and v are unit vectors, y and its gradient some ones; sums of 16 in another order.
            close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
            jax.tree.map(close, (y, moved, grad), (*right, right_grad))
            assert y.sharding.is_equivalent_to(sharded.sharding, 2)
            if axis_type == AxisType.Explicit and given is not state:
                typed = lambda tree: jax.tree.map(lambda a: jax.typeof(a).sharding, tree)
                assert typed(moved) == typed(given)
                # So a loop over steps of training keeps its types.
                again = lambda _, state: jn.spectral_norm(sharded, state, steps=steps)[1]
                jax.lax.fori_loop(0, 2, again, given)


def test_a_spectral_norm_state_can_be_exported(rng):
    w = jnp.asarray(draw(rng))
    state = jn.init_spectral_norm_state(w, KEY)
    f = jax.jit(jn.spectral_norm)
    called = export.deserialize(export.export(f)(w, state).serialize()).call(w, state)
    assert isinstance(called[1], jn.SpectralNormState)
    np.testing.assert_array_equal(called[0], f(w, state)[0])


# Derivatives, against formulas that JAX differentiates


def plain_weight_norm(v, g):
    return v / jnp.sqrt(jnp.sum(v**2, (0, 1), keepdims=True) + 1e-12) * g[None, None]


def plain_by_fan_in(w, gain):
    mean, var = jnp.mean(w, (0, 1), keepdims=True), jnp.var(w, (0, 1), keepdims=True)
    return (w - mean) / jnp.sqrt(jnp.maximum(var * 6, 1e-6)) * gain[None, None]


def spectral(train):
    def f(w, gain):
        state = jn.init_spectral_norm_state(jax.lax.stop_gradient(w), KEY)
        return jn.spectral_norm(w, state, train=train)[0] * gain[None, None]

    return f


def plain_spectral(train):
    def f(w, gain):
        m, norm = jax.lax.stop_gradient(w).reshape(-1, 4), jnp.linalg.norm
        u = jax.random.normal(KEY, (4,), m.dtype)
        v = m @ u / norm(m @ u)
        u = m.T @ v / norm(m.T @ v) if train else u / norm(u)
        return w / (v @ w.reshape(-1, 4) @ u) * gain[None, None]

    return f


PAIRS = {
    "weight_norm": (jn.weight_norm, plain_weight_norm),
    "fan_in": (functools.partial(jn.standardize_weight, fan_in=True), plain_by_fan_in),
    "spectral_norm": (spectral(True), plain_spectral(True)),
    "spectral_norm_in_evaluation": (spectral(False), plain_spectral(False)),
}


# What standardizes without fan_in is batch norm's equation, which test_derivatives.py tests.
@pytest.mark.usefixtures("x64", "unoptimized")
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.thorough
def test_every_derivative_agrees_with_the_plain_formula(name, rng):
    w, gain = jnp.asarray(rng.standard_normal((2, 3, 4))), jnp.asarray(rng.standard_normal(4))

    @functools.partial(jax.jit, static_argnums=0)
    def run(f, w, gain):
        def grad(w, gain):
            return jax.grad(lambda w, gain: jnp.sum(jnp.sin(f(w, gain))), (0, 1))(w, gain)

        tangents = jax.tree.map(jnp.cos, (w, gain))
        squares = lambda *args: sum(jnp.sum(g**2) for g in jax.vmap(grad, (0, None))(*args))
        return (
            jax.jvp(grad, (w, gain), tangents),  # forward over reverse
            jax.grad(squares, (0, 1))(jnp.stack([w, 1 - w]), gain),  # reverse over reverse
        )

    for a, b in zip(*(jax.tree.leaves(run(f, w, gain)) for f in PAIRS[name]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1, np.abs(b).max()))


# PyTorch


def torch_parametrized(kind, w, **options):
    """A linear layer of PyTorch with these weights, whose first axis has the features."""
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w))
    return torch, getattr(torch.nn.utils.parametrizations, kind)(layer, **options)


def test_pytorch_weight_norm(rng):
    w, g, dw = draw(rng, (5, 7)), draw(rng, 5), draw(rng, (5, 7))
    torch, layer = torch_parametrized("weight_norm", w)
    parameters = layer.parametrizations.weight
    with torch.no_grad():
        parameters.original0.copy_(torch.tensor(g[:, None]))
    layer.weight.backward(torch.tensor(dw))
    y, (dv, dg) = value_and_gradients(functools.partial(jn.weight_norm, feature_axis=0), dw, w, g)
    np.testing.assert_allclose(y, layer.weight.detach(), atol=1e-6)
    np.testing.assert_allclose(dv, parameters.original1.grad, atol=1e-6)
    np.testing.assert_allclose(dg, parameters.original0.grad[:, 0], atol=1e-6)


def test_pytorch_spectral_norm_in_training_and_evaluation(rng):
    """Their u and v are our v and u: each step of theirs begins with the rows."""
    w = draw(rng, (5, 7))
    torch, layer = torch_parametrized("spectral_norm", w, n_power_iterations=2)
    part = layer.parametrizations.weight[0]
    state = jn.SpectralNormState(jnp.asarray(part._v.numpy()), jnp.asarray(part._u.numpy()))
    for train in (True, True, False):
        layer.train(train)
        dy = draw(rng, w.shape)
        original = layer.parametrizations.weight.original
        original.grad = None
        expected = layer.weight
        expected.backward(torch.tensor(dy))
        f = functools.partial(jn.spectral_norm, state=state, steps=2, train=train)
        y, (dw,) = value_and_gradients(lambda w, f=f: f(w)[0], dy, w)
        _, state = f(w)
        np.testing.assert_allclose(y, expected.detach(), atol=2e-6)
        np.testing.assert_allclose(dw, np.asarray(original.grad), atol=5e-6)
        np.testing.assert_allclose(state.u, part._v, atol=2e-6)
        np.testing.assert_allclose(state.v, part._u, atol=2e-6)
        w = w + draw(rng, w.shape, 0.05)  # as training would change it
        with torch.no_grad():
            original.copy_(torch.tensor(w))
